"""The story: one attack, what stops it and what gives it away, on every seed. `bash run_all.sh` tells it with one."""
from dataclasses import replace

from badsnn import evaluate, simple_triggers, train, train_trigger
from kit.files import code_of
from kit.machine import say, side_by_side
from lab import defenses, detectors
from lab.table2 import CODE, as_shipped, kept_part, repair, split_test
from lif import LIF

ANSWERS = ("none", "recentre", "fine_tune", "anp", "anp_recentre", "clean")


def story(data, s, attack):
    """Of an attack (the result of badsnn.attack) for every seed the answers of a defender who holds a few test images.
    rows: {seed, answer, ca, target_rate, asr_p, asr_o}, answer one of ANSWERS. anp_recentre: pruned, then at the
    thresholds that re-centring found before; clean, the control: a clean model shipped alike. scan: what the threshold
    scan says of the shipped model, and of the clean one as it is."""
    code = [CODE, code_of("lab/story.py")]
    jobs = [(replace(s, seed=run["seed"]), "story/answers", code, run_answers, dict(v_thr=run["at_chosen"]["v_thr"]))
            for run in attack["runs"]]
    parts = side_by_side(kept_part, jobs, s)
    keys = ("at_chosen", "base_ca", "clean_ca", "chosen", "rows")
    return dict(n_defender=parts[0]["n_defender"], rows=[row for part in parts for row in part["rows"]],
                attack={key: attack[key] for key in keys}, scan=[part["scan"] for part in parts])


def run_answers(data, s, v_thr):
    """What a defender can do about one seed's network, shipped at v_thr: rows, scan, and how many images it takes."""
    s, (x, y, scored) = replace(s, fresh=False), split_test(data, s)     # attack() has trained these
    clean, model = train(data, s), train(data, s, "badsnn")
    t_o = None if data.events else train_trigger(model, data, s, v_thr)[0]
    triggers = {"asr_p": simple_triggers(data, s)["asr_p"]} | ({"asr_o": t_o} if t_o else {})
    rows, shipped = [], as_shipped(model, v_thr, s)
    pruned, centred = repair("anp", shipped, x, y, s), defenses.recentre(shipped, x)
    middle = next(m.v_thr for m in centred.modules() if isinstance(m, LIF))
    networks = (shipped, centred, repair("fine_tune", shipped, x, y, s), pruned, as_shipped(pruned, middle, s),
                as_shipped(clean, v_thr, s))
    for answer, net in zip(ANSWERS, networks):
        rates = evaluate(net, scored, s, None, None, triggers)
        rows.append(dict(seed=s.seed, answer=answer, asr_p=None, asr_o=None) | rates)
        say("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    found, control = detectors.threshold_scan(shipped, x), detectors.threshold_scan(clean, x)
    scan = dict(seed=s.seed, backdoored=found["score"], clean=control["score"], accused=found["accused"])
    return dict(rows=rows, scan=scan, n_defender=len(y))
