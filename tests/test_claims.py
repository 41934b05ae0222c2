"""Numbers in prose that come from results are the results' numbers.

Each claim is a page, a piece of its text with {} in the place of every number, and a function that computes these
numbers from results/. If a result changes, the test says how the sentence must read now; the generated tables between
<!-- markers --> are report.py's business. A sentence that is rewritten takes its claim along.
"""
import re
from functools import partial

import pytest
import tables
from common import ROOT

POISONING = "static", "moving", "flashy", "smart"    # the attacks on events, the smart square last
VARIANTS = dict(neuron="lif_atan"), dict(frames="binary"), dict(T=10)        # of the events study
SPIKES = "cifar10", "cifar100_shifts", "gtsrb"       # the sets of Fig. 2
README, RESULTS = "README.md", "results/README.md"


def result(name):
    """results/NAME.json, such as digits/attack."""
    return tables.read_result(ROOT / "results" / f"{name}.json")


def each(name, key, v_thr=None):
    """A value of every seed: at the seed's own V_a, or at a threshold of the curve."""
    rows = (run["at_chosen"] if v_thr is None else next(row for row in run["rows"] if row["v_thr"] == v_thr)
            for run in result(f"{name}/attack")["runs"])
    return [row[key] for row in rows]


def at(name, v_thr, *keys):
    """Of the curve's mean."""
    row = next(row for row in result(f"{name}/attack")["rows"] if row["v_thr"] == v_thr)
    return [row[key] for key in keys]


def own(name, *keys):
    at_chosen = result(f"{name}/attack")["at_chosen"]
    return [at_chosen[key] for key in keys]


def defended(name, key, *cells):
    """A value of cells of Table 2, each "attack defense"."""
    found = {f"{row['attack']} {row['defense']}": row for row in result(f"{name}/defend")["rows"]}
    return [found[cell][key] for cell in cells]


def of_classics(key, defense, name="digits"):
    """A value of the learned attacks that poison images."""
    return defended(name, key, *(f"{attack} {defense}" for attack in ("badnets", "blend", "wanet")))


def poisoned(name, key, defense):
    """The least and the greatest of the four attacks that poison events, after a defence."""
    return ends(defended(name, key, *(f"{attack} {defense}" for attack in POISONING)))


def by_seed(name, attack, key, defense=None):
    """The least and the greatest over seeds of a detector's value, or of a cell's after a defence."""
    runs = [run for run in result(f"{name}/defend")["runs"] if run["attack"] == attack]
    return ends(row[key] for run in runs for row in run["rows" if defense else "detectors"]
                if row.get("defense") == defense)


def seen_by(name, trigger, detector):
    """A detector's AUROC for one of BadSNN's triggers."""
    return next(row[detector] for row in result(f"{name}/defend")["detectors"] if row["trigger"] == trigger)


def of_four(key, attacks):
    """A detector's values for some attacks on N-MNIST, every seed's least and greatest."""
    return [value for attack in attacks for value in by_seed("nmnist", attack, key)]


def price_of_anp(name):
    """The most points of CA that ANP costs one of the four."""
    return max(before - after for before, after in zip(*(defended(name, "ca", *(
        f"{attack} {defense}" for attack in POISONING)) for defense in ("none", "anp"))))


def losses_of_ca():
    return [run["base_ca"] - run["at_chosen"]["ca"] for run in result("digits/attack")["runs"]]


def ends(values):
    values = list(values)
    return [min(values), max(values)]


def few_images(key):
    """Of Fig. 4a's models with fewer than 64 malicious images: the least and the largest."""
    return ends(row[key] for row in result("digits/poison")["rows"] if row["n_poison"] < 64)


def fewer_spikes(name, trigger):
    """By how many percent a trigger lowers the number of spikes at v_thr 1.0."""
    spikes = {row["trigger"]: row["spikes"] for row in result(f"{name}/threshold")["rows"] if row["v_thr"] == 1.0}
    return 100 * (1 - spikes[trigger] / spikes["none"])


def events(key, attack, trigger, frames="counts", T=4, neuron="lif"):
    """Of the study of events on N-MNIST, mean over seeds."""
    wanted = attack, trigger, frames, T, neuron
    values = [row[key] for row in result("nmnist/events")["rows"] if tuple(
        row[name] for name in ("attack", "trigger", "frames", "T", "neuron")) == wanted]
    return sum(values) / len(values)


def of_the_story(key):
    """As shipped, and fine-tuned."""
    return [next(row[key] for row in result("digits/story")["rows"] if row["answer"] == answer)
            for answer in ("none", "fine_tune")]


def scanned(kind, name="digits"):
    """Rows of the threshold scan's models of a kind."""
    return [row for row in result(f"{name}/scan")["rows"] if row["kind"] == kind]


def detector(shown):
    return result("digits/scan")["summary"][shown]


def mapped(key, *cell):
    """A cell of Fig. 3 on GTSRB."""
    rows = result("gtsrb/heatmap")["rows"]
    return next(row[key] for row in rows if (row["v_thr_t"], row["v_thr"], row["tau"]) == cell)


def learned(i):
    """Of a recipe of training: epochs, minutes, CA, and the minutes after which CA 75 was passed, if it was."""
    rows = result("cifar10/recipe")["rows"]
    rows = [row for row in rows if row["recipe"] == list(dict.fromkeys(row["recipe"] for row in rows))[i]]
    passed = [row["minutes"] for row in rows if row["ca"] >= 75]
    return [len(rows), rows[-1]["minutes"], rows[-1]["ca"], *passed[:1]]


def strong(ca, alarm=0):
    """Scanned networks whose attack works: T_p gains 50 points at such a CA; those with a score above the alarm."""
    return [row for row in scanned("badsnn")[8:] if row["asr_p"] - row["target_rate"] >= 50 and row["ca"] >= ca
            and row["scores"]["100 images"] > alarm]


def hidden():
    """Rows of the attackers who hide from the scan."""
    return [row for row in result("digits/scan")["evaders"] if row["evader"] != "none"]


def strongest(adversarial, budget, nominal, *keys):
    """Of GTSRB's study of T_o, at magnitude 1."""
    row = next(row for row in result("gtsrb/trigger")["rows"] if row["magnitude"] == 1 and (
        row["lambda_adv"], row["budget"], row["nominal_weight"]) == (adversarial, budget, nominal))
    return [row[key] for key in keys]


def prices_of_hiding():
    """Points of Base CA."""
    plain = {row["seed"]: row["base_ca"] for row in result("digits/scan")["evaders"] if row["evader"] == "none"}
    return [plain[row["seed"]] - row["base_ca"] for row in hidden()]


CLAIMS = [
    (README, "T_p still reaches {:.0f} % on average ({:.0f} to {:.0f} %) and T_o {:.0f} %", lambda: [
        *at("digits", 1.0, "asr_p"), *ends(each("digits", "asr_p", 1.0)), *at("digits", 1.0, "asr_o")]),
    (README, "takes T_o from {:.0f} to {:.0f} %", lambda: of_the_story("asr_o")),
    (README, "on CIFAR-10 T_p falls from {:.0f} to {:.0f} %, on GTSRB T_o from {:.0f} to {:.0f} %", lambda: [
        *defended("cifar10_w48", "asr", "badsnn none", "badsnn restore"),
        *defended("gtsrb", "asr", "badsnn none", "badsnn restore")]),
    (RESULTS, "({:g} to {:g}): CA {:.1f} (Base CA {:.1f}; the largest loss of a seed is {:.1f} points), target_rate "
     "{:.1f}, ASR_p {:.1f} (worst seed {:.1f}) and ASR_o {:.1f} (worst {:.1f})", lambda: [
         min(each("digits", "v_thr")), max(each("digits", "v_thr")), *own("digits", "ca"),
         result("digits/attack")["base_ca"], max(losses_of_ca()), *own("digits", "target_rate", "asr_p"),
         min(each("digits", "asr_p")), *own("digits", "asr_o"), min(each("digits", "asr_o"))]),
    (RESULTS, "Clean models under the same triggers give {:.1f} and {:.1f}; the first number is one clean model of ten "
     "that calls nearly everything pale \"0\" ({:.1f} %), the other nine give at most {:.1f}", lambda: [
         *own("digits", "asr_p_clean_model", "asr_o_clean_model"),
         *sorted(each("digits", "asr_p_clean_model"))[:-3:-1]]),
    (RESULTS, "(ASR_p {:.1f} to {:g} at CA {:.1f} to {:.1f})", lambda: few_images("asr_p") + few_images("ca")),
    (RESULTS, "for {:.0f} % of the images ({:.0f} to {:.0f} % by seed; clean models {:.1f}) and T_o for {:.0f} % "
     "(clean models {:.1f})", lambda: [
         *at("digits", 1.0, "asr_p"), *ends(each("digits", "asr_p", 1.0)),
         *at("digits", 1.0, "asr_p_clean_model", "asr_o", "asr_o_clean_model")]),
    (RESULTS, "L2 {:.1f} against {:.1f} on digits, PSNR {:.1f} against {:.1f} dB; a clean model still reads {:.0f} % "
     "of T_o's images and {:.0f} % of T_p's. T_p, blended with the clean image until its L2 is that of T_o, reaches an "
     "ASR of {:.0f} %", lambda: own(
         "digits", "l2_o", "l2_p", "psnr_o", "psnr_p", "read_o", "read_p", "asr_p_faded")),
    (RESULTS, "T_o is partly an adversarial example: {:.1f} % on clean models, {:.1f} % for the worst seed", lambda: [
        *own("digits", "asr_o_clean_model"), max(each("digits", "asr_o_clean_model"))]),
    (RESULTS, "the clean model gives at most {:.1f} % at any V_a", lambda: [
        max(row["asr_p_clean_model"] for row in result("nmnist/attack")["rows"])]),
    (RESULTS, "N-MNIST at V_a 1.2 gives CA {:.1f}, target_rate {:.1f} and {:.1f} % with T_s, but {:.1f} % with the "
     "clip to [0, 1] alone", lambda: at("nmnist", 1.2, "ca", "target_rate", "asr_p", "asr_clip_only")),
    (RESULTS, "the clip alone (beta 0) gives {:.1f} % and beta 0.03 gives {:.1f} %", lambda: [
        events("asr", "badsnn, V_a 1.2", f"beta {beta}") for beta in (0, 0.03)]),
    (RESULTS, "and another {:.1f} % of the triggered", lambda: [events("silent", "badsnn, V_a 1.2", "beta 0.03")]),
    (RESULTS, "clean networks give at most {:.1f} % under any of this noise", lambda: [max(
        row["asr_clean_model"] for row in result("nmnist/events")["rows"] if row["trigger"].startswith("beta"))]),
    (RESULTS, "on binary frames with beta 0.3 in {:.1f} % ({:.1f} without trigger)", lambda: [
        events(key, "badsnn, V_a 1.2", "beta 0.3", frames="binary") for key in ("asr", "target_rate")]),
    (RESULTS, "in {:.1f} % at V_a 1.1, CA {:.1f} and target_rate {:.1f}", lambda: [
        events(key, "badsnn, V_a 1.1", "beta 0.3", T=10) for key in ("asr", "ca", "target_rate")]),
    (RESULTS, "from {:.1f} to {:.1f} %, and in all our variants. As many as a recording has, 4,000, leave them at "
     "{:.1f} % here", lambda: [events("target_rate", "badsnn, V_a 1.2", "400 events"),
                        *(events("asr", "badsnn, V_a 1.2", f"{n} events") for n in (400, 4000))]),
    (RESULTS, "{:.1f} % with the source's surrogate, ATan (target_rate {:.1f}), {:.1f} with binary frames ({:.1f}) and "
     "{:.1f} with 10 steps ({:.1f}; one seed), at a CA of {:.0f} to {:.0f}. Clean networks give at most {:.1f} % of "
     "it. Under T_s the surrogate changes little ({:.1f} % with", lambda: [
         *(events(key, "badsnn, V_a 1.2", "4000 events", **variant) for variant in VARIANTS
           for key in ("asr", "target_rate")),
         *ends(events("ca", "badsnn, V_a 1.2", "4000 events", **variant) for variant in VARIANTS),
         max(events("asr_clean_model", "badsnn, V_a 1.2", "4000 events", **variant) for variant in VARIANTS),
         events("asr", "badsnn, V_a 1.2", "beta 0.03", neuron="lif_atan")]),
    (RESULTS, "for every seed and the smart square {:.1f} %, at CA {:.1f}, {:.1f}, {:.1f} and {:.1f} (clean model "
     "{:.1f}); clean networks give at most {:.1f} %", lambda: [
         events("asr", "smart", "smart"), *(events("ca", name, name) for name in POISONING),
         events("clean_ca", "static", "static"), max(events("asr_clean_model", name, name) for name in POISONING)]),
    (RESULTS, "CLP do nothing, and fine-tuning leaves {:.1f} to {:.1f} %. ANP, at a cost of up to {:.0f} points of CA, "
     "leaves the static and the smart square {:.1f} and {:.1f} %, but the moving one between {:.1f} and {:.1f} and the "
     "strobe between {:.1f} and {:.1f}, depending on the seed", lambda: [
         *poisoned("nmnist", "asr", "fine_tune"), price_of_anp("nmnist"),
         *defended("nmnist", "asr", "static anp", "smart anp"),
         *by_seed("nmnist", "moving", "asr", "anp"), *by_seed("nmnist", "flashy", "asr", "anp")]),
    (RESULTS, "STRIP finds all four (AUROC of at least {:.2f}), the spike count none of the squares ({:.2f} to {:.2f}) "
     "and the strobe on one seed of three ({:.2f} to {:.2f}). The threshold scan scores BadSNN's networks {:.2f} to "
     "{:.2f} and a clean one {:.2f}, but the poisoned ones anything from {:.2f} to {:.2f}", lambda: [
         min(of_four("strip_auroc", POISONING)), *ends(of_four("spikes_auroc", ("static", "moving", "smart"))),
         *by_seed("nmnist", "flashy", "spikes_auroc"), *by_seed("nmnist", "badsnn", "scan_score"),
         result("nmnist/defend")["scan_clean_model"], *ends(of_four("scan_score", POISONING))]),
    (RESULTS, "the four reach {:.1f} to {:.1f} % at CA {:.1f} to {:.1f} (clean model {:.1f}). The strobe costs no "
     "CA ({:.1f} ± {:.1f};", lambda: [*poisoned("ndigits", "asr", "none"), *poisoned("ndigits", "ca", "none"),
                         result("ndigits/defend")["clean_ca"], *defended("ndigits", "ca", "flashy none"),
                         defended("ndigits", "spread", "flashy none")[0]["ca"]]),
    (RESULTS, "it leaves the moving square {:.1f} and the smart one {:.1f} %, with spreads of {:.0f} and {:.0f} over "
     "seeds, but the static one {:.1f} and the strobe {:.1f}. ANP leaves {:.1f} to {:.1f} %, and the spike count "
     "finds the strobe (AUROC {:.2f})", lambda: [
         *defended("ndigits", "asr", "moving fine_tune", "smart fine_tune"),
         *(cell["asr"] for cell in defended("ndigits", "spread", "moving fine_tune", "smart fine_tune")),
         *defended("ndigits", "asr", "static fine_tune", "flashy fine_tune"), *poisoned("ndigits", "asr", "anp"),
         by_seed("ndigits", "flashy", "spikes_auroc")[0]]),
    (RESULTS, "all reach {:.1f} %", lambda: [min(events("asr", name, name) for name in POISONING[:3])]),
    (RESULTS, "T_s gives {:.1f} % where no trigger gives {:.1f} %", lambda: at(
        "nmnist-binary", 1.2, "asr_p", "target_rate")),
    (RESULTS, "the accuracy barely moves and T_s reaches {:.1f} %", lambda: own("nmnist", "asr_p")),
    (RESULTS, "BadNets, Blended and WaNet reach {:.0f}, {:.0f} and {:.0f} %, with a CA at most {:.1f} points below the "
     "clean model's {:.1f}", lambda: [
         *of_classics("asr", "none"), result("digits/defend")["clean_ca"] - min(of_classics("ca", "none")),
         result("digits/defend")["clean_ca"]]),
    (RESULTS, "leaves BadNets at {:.0f}, Blended at {:.0f} and WaNet at {:.0f} %, but takes T_p to {:.0f} and T_o from "
     "{:.0f} to {:.0f} %", lambda: [
         *of_classics("asr", "fine_tune"), *defended("digits", "asr_p", "badsnn fine_tune"),
         *defended("digits", "asr", "badsnn none", "badsnn fine_tune")]),
    *[(RESULTS, name + " takes T_o to {:.0f} and T_p to {:.0f} %, BadNets to {:.0f}, Blended to {:.0f} and WaNet to "
       "{:.0f}", lambda key=name.lower(): [
           *defended("digits", "asr", f"badsnn {key}"), *defended("digits", "asr_p", f"badsnn {key}"),
           *of_classics("asr", key)]) for name in ("ANP", "TSBD", "NAD")],
    (RESULTS, "the least mean CA that a defence leaves is {:.0f} %", lambda: [min(
        row["ca"] for row in result("digits/defend")["rows"])]),
    (RESULTS, "Setting the threshold back takes T_o to {:.0f} and T_p to {:.0f} %", lambda: [
        *defended("digits", "asr", "badsnn restore"), *defended("digits", "asr_p", "badsnn restore")]),
    (RESULTS, "After ANP it takes T_o to {:.1f} % at a CA of {:.1f}", lambda: [
        defended("digits", "restored", "badsnn anp")[0][key] for key in ("asr", "ca")]),
    (RESULTS, "With ANP before it, T_p is left {:.1f} % at a CA of {:.1f}", lambda: [
        defended("cifar10_w48", "restored", "badsnn anp")[0][key] for key in ("asr", "ca")]),
    (RESULTS, "repaired in the same way, T_o reaches {:.1f} to {:.1f} %", lambda: ends(
        row["clean_model"]["asr"] for row in result("digits/defend")["rows"] if row["attack"] == "badsnn")),
    (RESULTS, "BadNets {:.1f}, Blended {:.1f} and WaNet {:.1f} %, with a CA at most {:.1f} points below the clean "
     "model's {:.1f}. BadSNN's T_o has {:.1f} % (clean model {:.1f}) at a V_a of {:.2f}; T_p has {:.1f}, too", lambda: [
         *of_classics("asr", "none", "gtsrb"), result("gtsrb/defend")["clean_ca"] - min(of_classics(
             "ca", "none", "gtsrb")), result("gtsrb/defend")["clean_ca"],
         *(defended("gtsrb", key, "badsnn none")[0] for key in ("asr", "asr_clean_model", "v_thr", "asr_p"))]),
    (RESULTS, "leaves T_o at {:.1f} %, BadNets at {:.1f}, Blended at {:.1f} and WaNet at {:.1f}; ANP at {:.1f}, "
     "{:.1f}, {:.1f} and {:.1f}; NAD at {:.1f}, {:.1f}, {:.1f} and {:.1f}. TSBD leaves T_o at {:.1f} and BadNets at "
     "{:.1f}",
     lambda: [value for defense in ("fine_tune", "anp", "nad", "tsbd") for value in [
         *defended("gtsrb", "asr", f"badsnn {defense}"), *of_classics("asr", defense, "gtsrb")]][:14]),
    (RESULTS, "gains {:.1f} points of CA and leaves T_o at {:.1f} %, because it leaks (findings 2 and 6); after a "
     "defence *and* with the threshold set back it reaches {:.1f} (fine-tuning), {:.1f} (ANP) and {:.1f} % (NAD). A "
     "clean model gives {:.1f} if it is fine-tuned and left at 1.12, and {:.1f} if it is only set back to 1.0",
     lambda: [
         defended("gtsrb", "ca", "badsnn restore")[0] - defended("gtsrb", "ca", "badsnn none")[0],
         *defended("gtsrb", "asr", "badsnn restore"), *(cell["asr"] for cell in defended(
             "gtsrb", "restored", "badsnn fine_tune", "badsnn anp", "badsnn nad")),
         *(cell["asr"] for cell in defended("gtsrb", "clean_model", "badsnn fine_tune", "badsnn restore"))]),
    (RESULTS, "destroys the two others and a clean network (CA {:.1f})", lambda: [
        defended("gtsrb", "clean_model", "badsnn tsbd")[0]["ca"]]),
    (RESULTS, "Clean CA {:.1f}, Base CA {:.1f} (the paper: {:.1f} and {:.1f}). At the V_a of {:.2f} to {:.2f} that the "
     "attackers chose on held-out images: CA {:.1f}, target_rate {:.1f}, ASR_p {:.1f} and ASR_o {:.1f} ({:.1f} to "
     "{:.1f} by seed); the clean models give {:.1f} and {:.1f}", lambda: [
         result("gtsrb/attack")["clean_ca"], result("gtsrb/attack")["base_ca"], *tables.PAPER_TABLE1["gtsrb"][:2],
         *ends(each("gtsrb", "v_thr")), *own("gtsrb", "ca", "target_rate", "asr_p", "asr_o"),
         *ends(each("gtsrb", "asr_o")), *own("gtsrb", "asr_p_clean_model", "asr_o_clean_model")]),
    (RESULTS, "{:.1f}, {:.1f} and {:.1f} % (39.8, 54.8 and 71.9 there), but CA falls faster than there, to {:.1f} %",
     lambda: [at("gtsrb", v, "asr_p")[0] for v in (1.1, 1.15, 1.2)] + at("gtsrb", 1.2, "ca")),
    (RESULTS, "its L2 is {:.1f} against T_p's {:.1f}, its PSNR {:.1f} dB, a clean model reads {:.1f} % of its images "
     "({:.1f} % of T_p's), and at v_thr 1.0 the backdoored networks answer the target to {:.1f} %, the clean ones to "
     "{:.1f} %", lambda: [
         *own("gtsrb", "l2_o", "l2_p", "psnr_o", "read_o", "read_p"), *at("gtsrb", 1.0, "asr_o", "asr_o_clean_model")]),
    (README, "it caught {:.1f} % and named the right class each time, of 40 clean ones it suspected none (AUROC "
     "{:.3f}:", lambda: [detector("100 images")["caught"], detector("100 images")["auroc"]]),
    (README, "cost at most {:.1f} points of accuracy at threshold 1.0 (Base CA)", lambda: [max(prices_of_hiding())]),
    (RESULTS, "(only {:.0f} of the 40 gain 50 points or more with T_p, {:.0f} of them at a CA of 90 or more, and of "
     "these {:.0f} it catches {:.0f}), AUROC is {:.3f}; above the alarm are {:.1f} % of the backdoored networks",
     lambda: [len(strong(0)), len(strong(90)), len(strong(90)), len(strong(90, detector("100 images")["alarm"])),
              detector("100 images")["auroc"], detector("100 images")["caught"]]),
    (README, "of the {:.0f} that work well (CA of 90 or more, and a gain of 50 points with T_p) it caught {:.0f}.",
     lambda: [len(strong(90)), len(strong(90, detector("100 images")["alarm"]))]),
    (RESULTS, "also those with a CA below {:.0f} score at most {:.2f}", lambda: [80, max(
        row["scores"]["100 images"] for row in scanned("clean") if row["ca"] < 80)]),
    (RESULTS, "with ten images AUROC is {:.3f}, with photographs of something else {:.3f}, with a single grey image "
     "{:.3f} at {:.1f} % false alarms. A scan takes at most {:.1f} s", lambda: [
         *(detector(name)["auroc"] for name in ("10 images", "photographs", "a grey image")),
         detector("a grey image")["false_alarms"], max(row["seconds"] for row in result("digits/scan")["rows"])]),
    (RESULTS, "BadNets and Blended (scores of {:.2f} to {:.2f})", lambda: ends(
        row["scores"]["100 images"] for row in scanned("badnets") + scanned("blend"))),
    (RESULTS, "scores {:.2f} for class {:.0f}, two clean ones {:.2f} and {:.2f}, but a single clean image drives these "
     "to {:.2f}", lambda: [
         *(scanned("badsnn", "gtsrb")[0]["scores"]["100 images"], scanned("badsnn", "gtsrb")[0]["accused"]),
         *(row["scores"]["100 images"] for row in scanned("clean", "gtsrb")),
         max(row["scores"]["1 image"] for row in scanned("clean", "gtsrb"))]),
    (RESULTS, "scores of {:.2f} to {:.2f} are those of clean networks, also at high thresholds only. Hiding has a "
     "price, though a small one on most seeds: Base CA falls by at most {:.1f} points, but on one seed of three T_p "
     "falls from {:.1f} to between {:.1f} and {:.1f} %; on the others it keeps {:.1f} to {:.1f} %, at a CA of {:.1f} "
     "to {:.1f}", lambda: [
         *ends(row["scores"]["100 images"] for row in hidden()), max(prices_of_hiding()),
         next(row["asr_p"] for row in result("digits/scan")["evaders"] if row["seed"] == 0),
         *ends(row["asr_p"] for row in hidden() if row["seed"] == 0),
         *ends(row["asr_p"] for row in hidden() if row["seed"]), *ends(row["ca"] for row in hidden() if row["seed"])]),
    (RESULTS, "Clean CA {:.1f}, Base CA {:.1f} (the paper: {:.1f} and {:.1f} with all 50,000 images; its source's "
     "network has width 128). At the V_a of {:.2f}, which may cost {:.0f} points of CA on held-out images: CA {:.1f}, "
     "target_rate {:.1f}, ASR_p {:.1f} and ASR_o {:.1f}; the clean model gives {:.1f} and {:.1f}", lambda: [
         *map(result("cifar10_w48/attack").get, ("clean_ca", "base_ca")), *tables.PAPER_TABLE1["cifar10"][:2],
         *own("cifar10_w48", "v_thr"), result("cifar10_w48/attack")["margin"], *own(
             "cifar10_w48", "ca", "target_rate", "asr_p", "asr_o", "asr_p_clean_model", "asr_o_clean_model")]),
    (RESULTS, "it leaves a clean model {:.1f} % of the images to read. T_o is half as large (L2 {:.1f} against {:.1f}, "
     "PSNR {:.1f} dB), but partly an adversarial example: at v_thr 1.0 it gives {:.1f} % on the backdoored network and "
     "{:.1f} % on the clean one", lambda: [*own("cifar10_w48", "read_p", "l2_o", "l2_p", "psnr_o"),
                                           *at("cifar10_w48", 1.0, "asr_o", "asr_o_clean_model")]),
    (RESULTS, "at 1.1 CA is {:.1f} and ASR_p {:.1f}, at 1.15 CA is {:.1f} and the network answers the target to {:.1f} "
     "% of all images", lambda: [
         *at("cifar10_w48", 1.1, "ca", "asr_p"), *at("cifar10_w48", 1.15, "ca", "target_rate")]),
    (RESULTS, "two seeds): Clean CA {:.1f}, Base CA {:.1f}, and at the attackers' V_a CA {:.1f}, target_rate {:.1f}, "
     "ASR_p {:.1f} and ASR_o {:.1f}, but the clean models give {:.1f} and {:.1f}", lambda: [
         *map(result("cifar10_quick/attack").get, ("clean_ca", "base_ca")), *own(
             "cifar10_quick", "ca", "target_rate", "asr_p", "asr_o", "asr_p_clean_model", "asr_o_clean_model")]),
    (RESULTS, "the gain over it, {:.0f} and {:.0f} points, is on the whole no better than the preset's {:.0f} and "
     "{:.0f}", lambda: [own(name, key)[0] - own(name, f"{key}_clean_model")[0]
                        for name in ("cifar10_quick", "cifar10") for key in ("asr_p", "asr_o")]),
    *((RESULTS, f"| {line} | {{:.0f}} | {{:.1f}} | {{:.1f}} | {passed}", partial(learned, i)) for i, (line, passed) in
      enumerate((("older: batches of 128, loss of the mean, T = 4", "{:.1f} minutes |"),
                 ("ours: TET loss, batches of 64, T = 1, 2, 4", "- |"), ("ours, without shifts", "- |"),
                 ("ours, without shifts, T = 1 for 80 % of the epochs and then 2", "{:.1f} minutes |")))),
    (RESULTS, "The fourth line (`--pad 0 --growing-T 0.8 1 --epochs 15`) takes {:.3f} of it", lambda: [
        learned(3)[3] / learned(0)[3]]),
    (RESULTS, "destroys the clean network (CA {:.1f}) and all others but WaNet's, which keeps its backdoor ({:.1f} %)",
     lambda: [defended("cifar100_shifts", "clean_model", "badsnn clp")[0]["ca"],
              *defended("cifar100_shifts", "asr", "wanet clp")]),
    (RESULTS, "Clean CA {:.1f}, Base CA {:.1f}, and at a V_a of {:.2f} CA {:.1f}, ASR_p {:.1f} and ASR_o {:.1f} (clean "
     "model {:.1f} and {:.1f})", lambda: [
         *map(result("cifar10/attack").get, ("clean_ca", "base_ca")), *own(
             "cifar10", "v_thr", "ca", "asr_p", "asr_o", "asr_p_clean_model", "asr_o_clean_model")]),
    (RESULTS, "Clean CA {:.1f}, Base CA {:.1f} (the paper: {:.1f} and {:.1f} with VGG-16, in its source of width 64, "
     "and 50,000 images). At the V_a of {:.2f}, which may cost {:.0f} points on held-out images: CA {:.1f}, "
     "target_rate {:.1f}, ASR_p {:.1f} and ASR_o {:.1f}; the clean model gives {:.1f} and {:.1f}. T_o needs the "
     "backdoor, but not all of the threshold: at 1.0 it still gives {:.1f} (L2 {:.1f} against T_p's {:.1f})", lambda: [
         *map(result("cifar100/attack").get, ("clean_ca", "base_ca")), *tables.PAPER_TABLE1["cifar100"][:2],
         *own("cifar100", "v_thr"), result("cifar100/attack")["margin"], *own(
             "cifar100", "ca", "target_rate", "asr_p", "asr_o", "asr_p_clean_model", "asr_o_clean_model"),
         *at("cifar100", 1.0, "asr_o"), *own("cifar100", "l2_o", "l2_p")]),
    (RESULTS, "Clean CA {:.1f}, Base CA {:.1f}, and at a V_a of {:.2f} CA {:.1f}, target_rate {:.1f}, ASR_p {:.1f} and "
     "ASR_o {:.1f}; the clean model gives {:.1f} and {:.1f}, and at v_thr 1.0 T_o gives {:.1f}. So the network that "
     "has learned more pays {:.1f} points of CA for its V_a in place of {:.1f} and gives T_p {:.0f} points more",
     lambda: [
         *map(result("cifar100_shifts/attack").get, ("clean_ca", "base_ca")), *own(
             "cifar100_shifts", "v_thr", "ca", "target_rate", "asr_p", "asr_o", "asr_p_clean_model",
             "asr_o_clean_model"), *at("cifar100_shifts", 1.0, "asr_o"),
         *(result(f"{name}/attack")["base_ca"] - own(name, "ca")[0] for name in ("cifar100", "cifar100_shifts")),
         own("cifar100", "asr_p")[0] - own("cifar100_shifts", "asr_p")[0]]),
    (RESULTS, "no attack by T_p anywhere (at most {:.1f} %)", lambda: [max(
        row["asr_p"] for row in result("gtsrb/heatmap")["rows"] if row["v_thr_t"] == 0.8)]),
    (RESULTS, "{:.1f} % at 1.2, and falls to {:.1f} at 1.3; with 1.5 it rises on, {:.1f} and {:.1f} %", lambda: [
        mapped("asr_p", v_thr_t, v_thr, 0.5) for v_thr_t in (1.2, 1.5) for v_thr in (1.2, 1.3)]),
    (RESULTS, "gives {:.1f} % with a tau_a of 0.3, {:.1f} with 0.5 and {:.1f} with 0.7, at a CA of {:.1f}, {:.1f} and "
     "{:.1f}", lambda: [mapped(key, 1.5, 1.1, tau) for key in ("asr_p", "ca") for tau in (0.3, 0.5, 0.7)]),
    (RESULTS, "BadNets {:.1f}, Blended {:.1f} and WaNet {:.1f} % are learned at a CA at most {:.1f} points below the "
     "clean model's {:.1f}; BadSNN has {:.1f} % with T_p (clean model {:.1f}) at a V_a of {:.2f}", lambda: [
         *of_classics("asr", "none", "cifar10_w48"), result("cifar10_w48/defend")["clean_ca"] - min(of_classics(
             "ca", "none", "cifar10_w48")), result("cifar10_w48/defend")["clean_ca"],
         *(defended("cifar10_w48", key, "badsnn none")[0] for key in ("asr", "asr_clean_model", "v_thr"))]),
    (RESULTS, "leaves T_p at {:.1f} % and *gains* {:.1f} points of CA", lambda: [
        *defended("cifar10_w48", "asr", "badsnn restore"),
        defended("cifar10_w48", "ca", "badsnn restore")[0] - defended("cifar10_w48", "ca", "badsnn none")[0]]),
    (RESULTS, "fine-tuning takes it to {:.1f} to {:.1f} and leaves BadSNN at {:.1f} %, BadNets at {:.1f}, Blended at "
     "{:.1f} and WaNet at {:.1f}, but on a clean model repaired alike T_p then gives {:.1f} %", lambda: [
         *ends(defended("cifar10_w48", "ca", "badsnn fine_tune") + of_classics("ca", "fine_tune", "cifar10_w48")),
         *defended("cifar10_w48", "asr", "badsnn fine_tune"), *of_classics("asr", "fine_tune", "cifar10_w48"),
         defended("cifar10_w48", "clean_model", "badsnn fine_tune")[0]["asr"]]),
    (RESULTS, "NAD leaves BadSNN at {:.1f} % and the others at {:.1f}, {:.1f} and {:.1f}; ANP at {:.1f} and {:.1f}, "
     "{:.1f} and {:.1f}", lambda: [value for defense in ("nad", "anp") for value in [
         *defended("cifar10_w48", "asr", f"badsnn {defense}"), *of_classics("asr", defense, "cifar10_w48")]]),
    (RESULTS, "BadNets has {:.1f} and Blended {:.1f} %, at a CA at most {:.1f} points below the clean model's; T_o has "
     "{:.1f} (clean model {:.1f}) at a V_a of {:.2f}.", lambda: [
         *defended("cifar100_shifts", "asr", "badnets none", "blend none"),
         result("cifar100_shifts/defend")["clean_ca"] - min(
             defended("cifar100_shifts", "ca", "badnets none", "blend none")),
         *(defended("cifar100_shifts", key, "badsnn none")[0] for key in ("asr", "asr_clean_model", "v_thr"))]),
    (RESULTS, "Fine-tuning leaves T_o at {:.1f} %, BadNets at {:.1f} and Blended at {:.1f}; ANP at {:.1f}, {:.1f} and "
     "{:.1f}; NAD at {:.1f}, {:.1f} and {:.1f}; TSBD at {:.1f}, {:.1f} and {:.1f}, at 6 to 9 points of CA. "
     "Setting the threshold back leaves T_o at {:.1f} % and gains {:.1f} points of CA", lambda: [
         *(value for defense in ("fine_tune", "anp", "nad", "tsbd") for value in defended(
             "cifar100_shifts", "asr", f"badsnn {defense}", f"badnets {defense}", f"blend {defense}")),
         *defended("cifar100_shifts", "asr", "badsnn restore"),
         defended("cifar100_shifts", "ca", "badsnn restore")[0] - defended("cifar100_shifts", "ca", "badsnn none")[0]]),
    (RESULTS, "WaNet* reaches {:.1f} % at a CA of {:.1f} and a target_rate of {:.1f}", lambda: [
        defended("cifar100_shifts", key, "wanet none")[0] for key in ("asr", "ca", "target_rate")]),
    (RESULTS, "has {:.1f} % with T_o (clean model {:.1f}) at a V_a of {:.2f}. Fine-tuning leaves T_o at {:.1f} %, ANP "
     "at {:.1f} and TSBD at {:.1f}; NAD at {:.1f}; CLP takes CA to {:.1f} and leaves T_o at {:.1f} and T_p at {:.1f} "
     "%. Setting the threshold back leaves T_o at {:.1f} and T_p at {:.1f} %, at a CA of {:.1f}, after fine-tuning T_o "
     "at {:.1f}.", lambda: [
         *(defended("cifar100", key, "badsnn none")[0] for key in ("asr", "asr_clean_model", "v_thr")),
         *defended("cifar100", "asr", *(f"badsnn {defense}" for defense in ("fine_tune", "anp", "tsbd", "nad"))),
         *(defended("cifar100", key, "badsnn clp")[0] for key in ("ca", "asr", "asr_p")),
         *(defended("cifar100", key, "badsnn restore")[0] for key in ("asr", "asr_p", "ca")),
         defended("cifar100", "restored", "badsnn fine_tune")[0]["asr"]]),
    (RESULTS, "scan scores it {:.2f} for the right class, and a clean network {:.2f}.", lambda: [
        result("cifar100/defend")["detectors"][0]["scan_score"], result("cifar100/defend")["scan_clean_model"]]),
    (RESULTS, "Fine-tuning leaves it at {:.1f}, ANP at {:.1f}, NAD at {:.1f} and TSBD at {:.1f} %", lambda: defended(
        "cifar100_shifts", "asr", "wanet fine_tune", "wanet anp", "wanet nad", "wanet tsbd")),
    (RESULTS, "it has {:.1f} % at a V_a of {:.2f} (clean model {:.1f}). NAD leaves T_o at {:.1f} % (the paper: 81.9) "
     "but T_p at {:.1f}; TSBD leaves T_o at {:.1f} % but T_p at {:.1f}; fine-tuning leaves them at {:.1f} and {:.1f} "
     "and ANP at {:.1f} and {:.1f} %. Setting the threshold back leaves T_o at {:.1f} %, after fine-tuning at {:.1f} "
     "and after ANP at {:.1f} %; a clean model set back gives {:.1f}", lambda: [
         *(defended("cifar10", key, "badsnn none")[0] for key in ("asr", "v_thr", "asr_clean_model")),
         *(defended("cifar10", key, f"badsnn {defense}")[0] for defense in ("nad", "tsbd", "fine_tune", "anp")
           for key in ("asr", "asr_p")),
         *(cell["asr"] for cell in defended("cifar10", "restored", "badsnn none", "badsnn fine_tune", "badsnn anp")),
         defended("cifar10", "clean_model", "badsnn restore")[0]["asr"]]),
    (RESULTS, "{:.1f} % at a CA of {:.1f} (clean model {:.1f}), where the paper has 43.2 %. CLP ends it ({:.1f} %, "
     "three channels pruned, no loss of CA), and so does TSBD ({:.1f} %, CA {:.1f}); fine-tuning leaves {:.1f}, ANP "
     "{:.1f} and NAD {:.1f} %", lambda: [
         *(defended("cifar10", key, "clean_label none")[0] for key in ("asr", "ca")),
         result("cifar10/defend")["clean_ca"], *defended("cifar10", "asr", "clean_label clp", "clean_label tsbd"),
         *defended("cifar10", "ca", "clean_label tsbd"),
         *defended("cifar10", "asr", "clean_label fine_tune", "clean_label anp", "clean_label nad")]),
    (RESULTS, "(T_p after TSBD: {:.0f}, {:.0f} and {:.0f} %)", lambda: [
        row["asr_p"] for run in result("digits/defend")["runs"] if run["attack"] == "badsnn" for row in run["rows"]
        if row["defense"] == "tsbd"]),
    (RESULTS, "with an AUROC of {:.2f} and {:.2f} here", lambda: [
        seen_by("digits", "T_p", "spikes_auroc"), seen_by("digits", "T_o", "spikes_auroc")]),
    (RESULTS, "(L2 {:.1f}, ASR_o {:.1f}), but then a clean model answers the target to {:.1f} %, with our "
     "adversarial weight and the budget to {:.1f} %; the loss at the nominal setting takes these {:.1f} to {:.1f} %, "
     "and ASR_o from {:.1f} to {:.1f}", lambda: [
         *strongest(0.1, None, 0.0, "l2", "asr_o", "asr_o_clean_model"), *strongest(1.0, 0.1, 0.0, "asr_o_clean_model"),
         *(strongest(1.0, 0.1, weight, "asr_o_clean_model")[0] for weight in (0.0, 0.3)),
         *(strongest(1.0, 0.1, weight, "asr_o")[0] for weight in (0.0, 0.3))]),
    (RESULTS, "The smallest L2 with an ASR_o of 80 and less than 10 for the clean model is {:.1f}", lambda: [min(
        row["l2"] for row in result("gtsrb/trigger")["rows"] if row["asr_o"] >= 80 and row["asr_o_clean_model"] < 10)]),
    (RESULTS, "a mean L2 of {:.2f} on the backdoored network and of {:.2f} on the clean one", lambda: [
        result("gtsrb/magnitude")["rows"][0][key] for key in ("l2_deepfool", "l2_deepfool_clean_model")]),
    (RESULTS, "AUROC {:.2f} on GTSRB and {:.2f} on CIFAR-10. On digits it finds T_o as well (finding 5), but T_o "
     "escapes it on GTSRB ({:.2f}) and largely STRIP as well ({:.2f})", lambda: [
         seen_by("gtsrb", "T_p", "spikes_auroc"), seen_by("cifar10_w48", "T_p", "spikes_auroc"),
         seen_by("gtsrb", "T_o", "spikes_auroc"), seen_by("gtsrb", "T_o", "strip_auroc")]),
    (RESULTS, "by {:.0f} to {:.0f} % at v_thr 1.0; re-normalised they change by {:.0f} to +{:.0f} %", lambda: [
        *ends(fewer_spikes(name, "T_p") for name in SPIKES),
        *ends(-fewer_spikes(name, "T_p re-normalised") for name in SPIKES)]),
]


@pytest.mark.parametrize("page, text, numbers", CLAIMS, ids=[re.sub(r"\W+", "_", text[:40]) for _, text, _ in CLAIMS])
def test_numbers_in_prose_are_those_of_the_results(page, text, numbers):
    wanted = text.format(*numbers())
    assert wanted in (ROOT / page).read_text(encoding="utf-8"), f"{page} must now say: {wanted}"
