"""The page with one slider: two small digits networks, a backdoored one and its clean twin, compute in the browser.
`python -m lab.demo` trains them and writes demo.json; `python badsnn.py report` makes the page from that."""
import base64
import json
from dataclasses import replace

import numpy as np
import torch
from torch.nn import BatchNorm2d, Conv2d

from badsnn import deploy, evaluate, percentage, predict, simple_triggers, train, train_side_by_side, train_trigger
from data import load_for, to_float, to_uint8
from kit.files import ROOT
from lab.results import read_json, write_json, write_text
from settings import preset

GRID = [round(0.8 + 0.02 * i, 2) for i in range(36)]        # thresholds of the curves


def scale_of(conv):
    """The unit of a convolution's weights in 8 bits, [out, 1, 1, 1]: a power of two, by which division is exact."""
    return 2 ** (conv.weight.abs().amax((1, 2, 3), keepdim=True) / 127).log2().ceil()


def rounded(model):
    """The model, its convolutions rounded to 8 bits. All that the page says is said of it."""
    model.requires_grad_(False)
    for conv in [m for m in model.modules() if isinstance(m, Conv2d)]:
        conv.weight.copy_((conv.weight / scale_of(conv)).round() * scale_of(conv))
    return model


def packed(array, kind):
    """Numbers as base64 of their bytes."""
    return base64.b64encode(np.ascontiguousarray(array, dtype=kind).tobytes()).decode()


def stored(model):
    """A rounded model for JSON. A layer is a convolution of whole numbers [out, in, k, k], then a gain and a bias [2,
    out], which hold the unit and the BatchNorm; layers stand as in model.modules(). head: [K, features + 1]."""
    convs, norms = ([m for m in model.modules() if isinstance(m, kind)] for kind in (Conv2d, BatchNorm2d))
    layers = []
    for conv, norm in zip(convs, norms):
        scale, slope = scale_of(conv), norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        affine = torch.stack([slope * scale.flatten(), norm.bias - norm.running_mean * slope])
        layers.append(dict(shape=list(conv.weight.shape), stride=conv.stride[0],
                           weights=packed(conv.weight / scale, np.int8), affine=packed(affine, np.float64)))
    return dict(layers=layers, head=packed(torch.cat([model.head.weight, model.head.bias[:, None]], 1), np.float64))


def row(model, data, x_o, s, v):
    """What PyTorch counts at threshold v, in percent. x_o: data's test images of other classes under T_o, in 8 bits."""
    measured = evaluate(model, data, s, v, s.tau_a, dict(asr_p=simple_triggers(data, s)["asr_p"]))
    return dict(v_thr=v, **measured, asr_o=percentage(predict(model, x_o, s, v, s.tau_a) == s.target))


def compute(data, s):
    """What demo.json holds: settings, networks, ten test images of every class, also under T_o, and rows of counts."""
    models = dict(backdoored=rounded(train(data, s, "badsnn")), clean=rounded(train(data, s)))
    v_thr = deploy(models["backdoored"], data, s)[0]
    chosen = torch.stack([(data.y_test == k).nonzero().flatten()[:10] for k in range(10)], 1).flatten()
    x, y = data.x_test[chosen], data.y_test[chosen]
    x_o = to_uint8(train_trigger(models["backdoored"], data, s, v_thr)[0](to_float(x, s)))
    shown, others = replace(data, x_test=x, y_test=y), x_o[y != s.target]
    rows = {name: [row(model, shown, others, s, v) for v in sorted({*GRID, v_thr})] for name, model in models.items()}
    return dict(s.of(), device=s.device, torch=torch.__version__, v_thr=v_thr, mean=data.mean, std=data.std,
                labels=y.tolist(), images=packed(x[:, 0], np.uint8), images_o=packed(x_o, np.uint8), rows=rows,
                networks={name: stored(model) for name, model in models.items()})


def write_page(result, path):
    """The page at `path`, made of demo.json at `result` and the template."""
    text = json.dumps(read_json(result), separators=(",", ":")).replace("<", "\\u003c")
    template = (ROOT / "lab/demo.html").read_text(encoding="utf-8")
    write_text(path, template.replace("{/* demo.json */}", text))


if __name__ == "__main__":
    settings = preset("digits", width=8, margin=3.0)
    train_side_by_side(settings, [(settings, "badsnn"), (settings, None)])
    write_json(settings.results / "digits/demo.json", compute(load_for(settings), settings))
