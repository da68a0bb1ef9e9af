"""A file in few bits holds Q_b of the weights, exactly; what reads it refuses what is not one."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from taciturn.core import random
from taciturn.core.errors import ConfigError, ModelError, RunError
from taciturn.core.rounding import codes, quantized
from taciturn.precision import graph, packed
from taciturn.precision.fake import deployed
from taciturn.precision.modes import BITS, levels

NEEDED = "export to ONNX needs onnx, onnxruntime, onnxscript: pip install 'taciturn[export]'"
onnx_only = pytest.mark.skipif(not graph.available(), reason=NEEDED)


class Images(nn.Module):
    """A first convolution that stays float, one that does not, statistics of BatchNorm, linear layers without bias too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.wide, self.bare, self.head = nn.Linear(96, 33), nn.Linear(33, 20, bias=False), nn.Linear(20, 5)
        self.norm.running_mean.copy_(torch.linspace(-1, 1, 24))
        self.norm.running_var.copy_(torch.linspace(0.1, 3, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, 1, 8, 8] -> [b, 5]."""
        x = nn.functional.max_pool2d(torch.relu(self.first(x)), 2)
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.second(x))), 2)
        return self.head(self.bare(torch.relu(self.wide(x.flatten(1)))).tanh())


class Words(nn.Module):
    """A table, linear layers on [b, l, f], and a head that is the table itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(40, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[b, l] -> [b, 40]."""
        return self.head(torch.tanh(self.inner(self.table(ids)))).mean(1)


def images(n: int = 9) -> torch.Tensor:
    return random.normal(random.key(2), n, 1, 8, 8)


def words(n: int = 9) -> torch.Tensor:
    return torch.arange(7 * n).remainder(40).view(n, 7)


MODELS = {"images": (Images, images), "words": (Words, words)}


def build(name: str):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name][0]().eval(), MODELS[name][1]()


def lowered(model: nn.Module, bits: int) -> nn.Module:
    made = copy.deepcopy(model)
    made.load_state_dict(deployed({n: p.detach() for n, p in model.named_parameters()}, bits), strict=False)
    return made


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert float((got - want).abs().max() / want.std()) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_times_scales_are_the_quantizer_bit_for_bit(bits, dtype):
    for shape in ((20, 33), (16, 17, 3, 3)):
        w = random.normal(random.key(bits), *shape).to(dtype)
        w[2] = 0.0
        k, scale = codes(w, bits)
        assert k.dtype == torch.int8 and int(k.abs().max()) == levels(bits) and int(k[2].abs().max()) == 0
        assert torch.equal(k * scale.view(-1, *[1] * (w.dim() - 1)), quantized(w, torch.tensor(levels(bits))))


@pytest.mark.parametrize("n", [0, 1, 6, 7])
def test_nibbles_come_back(n):
    k = torch.arange(n).remainder(16).sub(8).to(torch.int8)
    assert packed.nibbles(k).shape == ((n + 1) // 2,)
    assert torch.equal(packed.from_nibbles(packed.nibbles(k), k.shape), k)


# ----------------------------------------------------------------------------------------------------------- packed


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_model_is_the_quantized_one(name, bits, tmp_path):
    model, x = build(name)
    path = packed.save(model, tmp_path / "model.safetensors", bits)
    with torch.no_grad():
        for parameter in (other := copy.deepcopy(model)).parameters():
            parameter.zero_()
    found, want = packed.load(path, other), lowered(model, bits)
    for place, module in want.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None:
            assert torch.equal(found.get_submodule(place).weight, weight), place
    assert all(torch.equal(dict(found.named_buffers())[n], b) for n, b in want.named_buffers())
    with torch.no_grad():
        close(found(x), want(x), 0.1)  # inputs of linear layers have 7 bits


def test_linear_layers_compute_with_integers_where_torch_can(tmp_path):
    model, _ = build("images")
    found = packed.load(packed.save(model, tmp_path / "m", 8), model)
    kinds = {place: type(module) for place, module in found.named_children()}
    assert kinds["second"] is nn.Conv2d and kinds["head"] is nn.Linear
    if torch.backends.quantized.engine in ("x86", "fbgemm"):
        assert kinds["wide"] is kinds["bare"] is packed.Int8Linear


def test_without_a_kernel_the_weights_are_dequantized(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "_packed", lambda k, scale, bias: None)
    model, x = build("images")
    found = packed.load(packed.save(model, tmp_path / "m", 4), model)
    with torch.no_grad():
        assert torch.equal(found(x), lowered(model, 4)(x))


def test_inputs_near_the_ends_of_their_range_do_not_overflow(tmp_path):
    """Products of unsigned and signed 8 bits, two at a time, overflow 16-bit sums: all ends meet here."""
    layer = nn.Linear(64, 16, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    found = packed.load(packed.save(layer, tmp_path / "m", 8), layer)
    with torch.no_grad():
        assert float((found(torch.ones(3, 64)) / 64 - 1).abs().max()) < 0.02


@pytest.mark.parametrize("bits", BITS)
def test_bytes_of_a_packed_file(bits, tmp_path):
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 4))
    size = packed.save(model, tmp_path / "m", bits).stat().st_size
    body = 256 * 256 * (4 if bits <= 4 else 8) // 8 + 4 * 256 + 4 * (256 + 4 * 256 + 4)
    assert body <= size <= body + 700


def _rewritten(path, change, meta=None):
    tensors = change(load_file(path))
    path.write_bytes(to_bytes(tensors, meta or {"format": packed.FORMAT, "bits": "8"}))


BROKEN = {
    "no-file": (lambda p: p.unlink(), RunError, "cannot read"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-9]), RunError, "cannot read"),
    "not-ours": (lambda p: _rewritten(p, lambda t: t, {"format": "pt"}), RunError, "exported as int8"),
    "bits": (lambda p: _rewritten(p, lambda t: t, {"format": packed.FORMAT, "bits": "9"}), RunError, "2 to 8 bits"),
    "missing": (lambda p: _rewritten(p, lambda t: {n: v for n, v in t.items() if n != "head.bias"}), ModelError, "missing"),
    "more": (lambda p: _rewritten(p, lambda t: t | {"tail": torch.ones(2)}), ModelError, "no tail"),
    "shape": (lambda p: _rewritten(p, lambda t: t | {"head.bias": torch.ones(3)}), ModelError, r"head.bias \[5\]"),
    "codes": (
        lambda p: _rewritten(p, lambda t: t | {"wide.weight.codes": t["wide.weight.codes"][:, :-1].contiguous()}),
        ModelError,
        "wide.weight",
    ),
    "type": (
        lambda p: _rewritten(p, lambda t: t | {"wide.weight.codes": t["wide.weight.codes"].int()}), ModelError, "int32"
    ),
    "beyond": (
        lambda p: _rewritten(p, lambda t: t | {"wide.weight.codes": torch.full_like(t["wide.weight.codes"], -128)}),
        RunError,
        "beyond 8 bits",
    ),
    "no-scale": (
        lambda p: _rewritten(p, lambda t: {n: v for n, v in t.items() if n != "wide.weight.scale"}), ModelError, "None"
    ),
    "infinite": (
        lambda p: _rewritten(p, lambda t: t | {"wide.weight.scale": t["wide.weight.scale"] / 0}), RunError, "not finite"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused(name, tmp_path):
    model, _ = build("images")
    path = packed.save(model, tmp_path / "model.safetensors", 8)
    spoil, error, message = BROKEN[name]
    spoil(path)
    with pytest.raises(error, match=message):
        packed.load(path, model)


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_bits_that_make_no_sense_are_refused(bits, tmp_path):
    with pytest.raises(ConfigError, match="2 to 8"):
        packed.save(nn.Linear(16, 16), tmp_path / "m", bits)


# ------------------------------------------------------------------------------------------------------------- ONNX


QUICK = [("images", 8)]
ALL = QUICK + [pytest.param(*one, marks=pytest.mark.slow) for one in (("images", 0), ("images", 3), ("words", 4))]


@onnx_only
@pytest.mark.parametrize(("name", "bits"), ALL)
def test_the_logits_of_an_onnx_file_are_those_of_the_quantized_model(name, bits, tmp_path):
    import onnx

    model, x = build(name)
    path = graph.save(model, (x[:2],), tmp_path / "model.onnx", bits)
    with torch.no_grad():
        want = lowered(model, bits)(x)
        close(graph.session(path)(x), want, 1e-5)
        if bits:
            assert float((want - model(x)).abs().max() / want.std()) > 1e-3, "the bits make a difference"
    proto = onnx.load(str(path))
    held = {one.name: one for one in proto.graph.initializer}
    for weight, p in model.named_parameters():
        weight = "head.weight" if name == "words" and weight == "table.weight" else weight  # tied: under its last name
        if bits and min(p.shape[:2]) >= 16 and p.dim() > 1:
            assert held[f"{weight}.codes"].data_type == (onnx.TensorProto.INT4 if bits <= 4 else onnx.TensorProto.INT8)
            k = torch.from_numpy(onnx.numpy_helper.to_array(held[f"{weight}.codes"]).astype("int8"))
            assert torch.equal(k, codes(p.detach(), bits)[0]) and weight not in held
        else:
            assert held[weight].data_type == onnx.TensorProto.FLOAT, "few features stay float"
    content = path.read_bytes()
    assert b".py" not in content and b"site-packages" not in content, "paths of this machine"


@onnx_only
@pytest.mark.parametrize("name", ["images", pytest.param("words", marks=pytest.mark.slow)])
def test_dynamic_layers_compute_with_integers(name, tmp_path):
    import onnx

    model, x = build(name)
    path = graph.save(model, (x[:2],), tmp_path / name, 8, dynamic=True)
    kinds = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert kinds.count("MatMulInteger") == 2, kinds  # wide and bare; inner and head
    with torch.no_grad():
        close(graph.session(path)(x), lowered(model, 8)(x), 0.06)


@onnx_only
@pytest.mark.slow
def test_bytes_of_an_onnx_file(tmp_path):
    model, x = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4)), torch.zeros(2, 256)
    float_bytes = graph.save(model, (x,), tmp_path / "0").stat().st_size
    for bits, dynamic, each in ((8, False, 1), (8, True, 1), (4, False, 0.5)):
        size = graph.save(model, (x,), tmp_path / "q", bits, dynamic).stat().st_size
        assert abs(float_bytes - size - (256 * 256 * (4 - each) - 4 * 256)) < 2000


@onnx_only
@pytest.mark.slow
def test_a_model_that_torch_cannot_export_and_a_file_that_is_none(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x + 1 if float(x.sum()) > 0 else x

    with pytest.raises(ModelError, match="cannot write this model as ONNX"):
        graph.save(Branching(), (torch.ones(2, 3),), tmp_path / "m")
    (tmp_path / "text").write_text(json.dumps({}))
    with pytest.raises(RunError, match="as ONNX"):
        graph.session(tmp_path / "text")


def test_without_the_packages_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    assert not graph.available()
    with pytest.raises(ConfigError, match=r"onnx: pip install 'taciturn\[export\]'"):
        graph.save(nn.Linear(2, 2), (torch.ones(2, 2),), tmp_path / "m")
