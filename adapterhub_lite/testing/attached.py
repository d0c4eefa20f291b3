"""On a live model: the method through `adapt`, trained, weighted, merged, cast, copied and taken off again."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import AdapterError, NotMergeable
from ..live import adapt
from ..protocol import Method
from ..registry import registry
from .capability import has_merge, has_refusal
from .check import CheckFailed, CheckSkipped, check, require, within
from .weights import EXACT
from .zoo import EXAMPLES, Example, bits, changed, described, difference, examples, has_example, moved, sibling

WEIGHTS = {"a": 0.7, "b": -0.3}
KEEP = "let once() compute from p and the site's weight alone, under a name of its own"
# Relative to the largest output, after three layers in that dtype.
ROUGH = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}


class Fixture:
    """An example model with two adapters of the method attached, "a" and "b", moved off their start; none is active."""

    def __init__(self, method: Method, example: Example, dtype: torch.dtype) -> None:
        self.example, self.kind = example, example.kind
        self.model, self.x = example.model(dtype), example.input(dtype)
        self.base = bits(self.model.state_dict())
        self.modules = {name: type(module) for name, module in self.model.named_modules()}
        self.untouched = self()  # the base's own output
        mine = {id(p) for p in self.model.parameters()}
        self.adapters = adapt(self.model)
        for seed, (name, own) in enumerate((("a", method), ("b", sibling(method)))):
            self.adapters.add(name, own, targets=list(example.sites(self.model, own)), seed=seed)
        self.adapters.activate(WEIGHTS)
        self.tensors = {name: p for name, p in self.model.named_parameters() if id(p) not in mine}
        self.trained = {name: p for name, p in self.tensors.items() if p.requires_grad}
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(moved(p, 0, name))
        self.adapters.activate(None)

    def __call__(self) -> Tensor:
        """The output for the example's input, with whatever is active."""
        with torch.no_grad():
            y: Tensor = self.model(self.x)
        return y

    def merge(self) -> None:
        """Merge what is active; a method may still say that it cannot be."""
        try:
            self.adapters.merge()
        except NotMergeable as error:
            raise CheckSkipped(str(error)) from None

    def now(self) -> dict[str, Tensor]:
        """The state dict without the adapters: what a plain model has."""
        return {n: t for n, t in self.model.state_dict().items() if "adapters" not in n.split(".")}

    def plain(self, values: Mapping[str, Tensor]) -> nn.Module:
        """A model without adapters that has these values, and no others."""
        model = self.example.model()
        for name, t in values.items():
            module, _, own = name.rpartition(".")
            model.get_submodule(module).register_parameter(own, nn.Parameter(t))
        return model


@check(has_example)
def off_is_exact(method: Method) -> str:
    """With nothing active the output is the base's, bit for bit; after `remove` the model is as it was."""
    for example in examples(method):
        f = Fixture(method, example, torch.float32)
        _same(f(), f.untouched, f"{f.kind}: the output with no adapter active is not the base's")
        f.adapters.activate("a")
        on = f()
        require(
            not torch.equal(on, f.untouched),
            f"{f.kind}: an active adapter does nothing",
            fix="add ΔW to the output",
        )
        f.adapters.activate(None)
        _same(f(), f.untouched, f"{f.kind}: the output is not the base's any more after a forward")
        for name in WEIGHTS:
            f.adapters.remove(name)
        left = changed(f.base, f.model.state_dict())
        require(not left, f"{f.kind}: {', '.join(left[:3])} differ after remove", fix="keep off the base module")
        _same(f(), f.untouched, f"{f.kind}: the output is not the base's after remove")
    return ""


@check(has_example)
def base_names_unchanged(method: Method) -> str:
    """Modules and parameters of the base keep names, classes and values; all that is new is in `adapters`."""
    for example in examples(method):
        f = Fixture(method, example, torch.float32)
        f.adapters.activate("a")
        f()
        now = {name: type(module) for name, module in f.model.named_modules()}
        gone = sorted(name for name, cls in f.modules.items() if now.get(name) is not cls)
        require(not gone, f"{f.kind}: the modules {', '.join(gone)} are gone or of another class", fix="replace none")
        lost = changed(f.base, f.now())
        require(
            not lost,
            f"{f.kind}: {', '.join(lost)} of the state dict are new, gone or changed",
            fix="give tensors from init, and leave the module alone",
        )
    return ""


@check(has_example)
def only_adapter_gets_gradients(method: Method) -> str:
    """After a backward pass every trained tensor of an active adapter has a gradient, and nothing else has."""
    count = 0
    for example in examples(method):
        f = Fixture(method, example, torch.float32)
        f.adapters.activate(WEIGHTS)
        _loss(f.model(f.x)).backward()
        for name, p in f.model.named_parameters():
            if name not in f.trained:
                what = "frozen tensor" if name in f.tensors else "base weight"
                require(p.grad is None, f"{f.kind}: the {what} {name} got a gradient", fix="leave requires_grad alone")
                continue
            require(
                p.grad is not None and bool((p.grad != 0).any()),
                f"{f.kind}: {name} is trained and gets no gradient",
                fix="use it in forward without detaching it, or give it as a Tensor: then it is frozen",
            )
            count += 1
    return f"{count} tensors"


@check(has_example, has_merge)
def two_adapters_add_up(method: Method) -> str:
    """0.7 a - 0.3 b live equals the merged model, whose weight is the base's and the two weighted changes."""
    worst = 0.0
    for example in examples(method):
        f = Fixture(method, example, torch.float64)
        f.adapters.activate(WEIGHTS)
        live = f()
        both = _merged(f)
        off = difference(_output(f.plain(both), f.x), live)
        within(off, EXACT, f"{f.kind}: live and merged differ for two adapters", fix="let forward leave x and y alone")
        alone = {}
        for name in WEIGHTS:
            f.adapters.activate(name)
            alone[name] = _merged(f)
        for key in both:
            base = f.base.get(key, torch.zeros_like(both[key]))  # none: a bias where there was none
            want = base + sum(w * (alone[name][key] - base) for name, w in WEIGHTS.items())
            part = difference(both[key], want)
            within(part, EXACT, f"{f.kind}: {key} is not the sum of the changes", fix="let merge() change nothing else")
            off = max(off, part)
        worst = max(worst, off)
    return f"max |diff| {worst:.1e}"


@check(has_example, has_merge)
def unmerge_is_exact(method: Method) -> str:
    """`unmerge` puts the base's own bits back, in every dtype."""
    for example in examples(method):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            f = Fixture(method, example, dtype)
            f.adapters.activate(WEIGHTS)
            live = f()
            f.merge()
            f.adapters.unmerge()
            lost = changed(f.base, f.now())
            require(not lost, f"{f.kind} in {dtype}: {', '.join(lost)} came back changed", fix="merge out of place")
            _same(f(), live, f"{f.kind} in {dtype}: the output is another one after merge and unmerge")
    return ""


@check(has_example)
def casts_and_copies(method: Method) -> str:
    """`.to(dtype)` and deepcopy keep outputs and sharing, and a copy is independent."""
    for example in examples(method):
        f = Fixture(method, example, torch.float32)
        f.adapters.activate(WEIGHTS)
        want, shared = f(), _storages(f.model)
        twin = copy.deepcopy(f.model)
        _same(_output(twin, f.x), want, f"{f.kind}: a deep copy computes something else")
        require(
            len(_storages(twin)) == len(shared) and not _storages(twin) & shared,
            f"{f.kind}: a deep copy shares or splits tensors",
            fix="keep no tensor outside of those init gives",
        )
        for dtype in (torch.float64, torch.bfloat16):
            cast = copy.deepcopy(f.model)
            _output(cast, f.x)  # what a rule keeps between calls would be of the old dtype
            cast.to(dtype)
            require(
                len(_storages(cast)) == len(shared), f"{f.kind}: {dtype} splits shared tensors", fix="share by lookup"
            )
            got = _output(cast, f.x.to(dtype) if f.x.is_floating_point() else f.x)
            bound = ROUGH[torch.float32 if dtype == torch.float64 else dtype]
            within(
                difference(got, want), bound, f"{f.kind}: another output in {dtype}", fix="keep no tensor between calls"
            )
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        _same(f(), want, f"{f.kind}: changing a copy changes the original")
    return ""


@check(has_example)
def inference_keeps_nothing_else(method: Method) -> str:
    """Within `inference` outputs are the same bits as outside, for every input, and after tensors were changed."""
    for example in examples(method):
        f = Fixture(method, example, torch.float64)
        f.adapters.activate(WEIGHTS)
        before, other = f(), _output(f.model, f.x.flip(0))
        base = [p for n, p in f.model.named_parameters() if n not in f.tensors and p.is_floating_point()]
        with f.adapters.inference(), torch.no_grad():
            _same(f(), before, f"{f.kind}: another output within inference()")
            _same(f(), before, f"{f.kind}: another output for the second call within inference()")
            got = _output(f.model, f.x.flip(0))
            _same(got, other, f"{f.kind}: what once() keeps depends on the input", KEEP)
            for name, p in f.trained.items():
                p.copy_(moved(p, 1, name))
            own = f()
            for p in base:
                p.mul_(1.25)
            scaled = f()
        _same(scaled, f(), f"{f.kind}: once() keeps what the base's weights change", KEEP)
        with torch.no_grad():
            for p in base:
                p.mul_(0.8)
        within(difference(own, f()), EXACT, f"{f.kind}: once() keeps what the adapter's tensors change", fix=KEEP)
    return ""


@check(has_example)
def half_precision_base(method: Method) -> str:
    """On a bfloat16 or float16 base, output and gradients are finite, of the right dtype and near float64's."""
    worst = 0.0
    for example in examples(method):
        for dtype in (torch.bfloat16, torch.float16):
            f = Fixture(method, example, dtype)
            f.adapters.activate("a")
            got = f.model(f.x)
            require(
                got.dtype == dtype, f"{f.kind}: a {dtype} base gives {got.dtype}", fix="return y's dtype from forward"
            )
            x = f.x.double() if f.x.is_floating_point() else f.x
            off = difference(got, _output(copy.deepcopy(f.model).double(), x))
            within(
                off, ROUGH[dtype], f"{f.kind}: far from float64 on a {dtype} base", fix="compute in the tensors' dtype"
            )
            _loss(got).backward()
            broken = [name for name, p in f.trained.items() if p.grad is not None and not p.grad.isfinite().all()]
            require(not broken, f"{f.kind} in {dtype}: no finite gradient at {broken[:1]}", fix="compute in float32")
            worst = max(worst, off)
    return f"max |diff| {worst:.1e}"


class Unknown(nn.Module):
    """A layer of no known kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


@check()
def unsupported_layers_are_refused(method: Method) -> str:
    """A layer of an unknown kind, or of one that it does not claim, is refused by name, and the model left alone."""
    models: dict[str, tuple[nn.Module, str]] = {"unknown": (nn.Sequential(Unknown()), "0")}
    known = registry().site_kinds()
    claimed = [known[kind] for kind in method.site_kinds if kind in known]
    for kind, example in EXAMPLES.items():
        if example.available:
            model = example.model(torch.float32)
            target = next(iter(example.sites(model)))
            if not any(own.accepts(model.get_submodule(target)) for own in claimed):
                models[kind] = model, target
    for kind, (model, target) in models.items():
        before = bits(model.state_dict())
        try:
            adapt(model).add("a", method, targets=[target])
        except AdapterError as error:
            if target not in str(error):
                raise CheckFailed(
                    f"the error for {target!r} does not name it: {error}", fix="name the layer"
                ) from error
        else:
            raise CheckFailed(f"an adapter was put on a layer of kind {kind}", fix="claim site_kinds in a frozenset")
        left = changed(before, model.state_dict())
        require(not left, f"{', '.join(left)} changed although {kind} was refused", fix="check before changing")
    return f"refused: {', '.join(models)}"


@check(has_example, has_refusal)
def refusals_say_why(method: Method) -> str:
    """What `refuses` gives at a layer is None, or the reason that a user reads who names the layer."""
    reasons = []
    for kind, example in EXAMPLES.items():
        if not example.available or kind not in method.site_kinds:
            continue
        model = example.model(torch.float32)
        for name, site in example.sites(model).items():
            why = method.at(name).refuses(site)
            if why is None:
                continue
            require(
                isinstance(why, str) and bool(why.strip()),
                f"refuses gives {why!r} at a {described(site)}",
                fix="give the reason in a few words, or None",
            )
            try:
                adapt(model).add("a", method, targets=[name])
            except AdapterError as error:
                told = name in str(error) and why in str(error)
                require(told, f"the error for {name!r} does not tell why: {error}", fix="give a shorter reason")
            else:
                require(
                    False, f"an adapter was put on a {described(site)}", fix="let refuses() depend on the site alone"
                )
            reasons.append(why)
    return f"{len(reasons)} layers"


def _merged(f: Fixture) -> dict[str, Tensor]:
    """The base's values with what is active folded in; the model is unmerged again."""
    f.merge()
    values = bits(f.now())
    f.adapters.unmerge()
    return values


def _output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(x)
    return y


def _loss(y: Tensor) -> Tensor:
    return y.float().square().sum()


def _storages(model: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in model.parameters() if p.numel()}


def _same(got: Tensor, want: Tensor, what: str, fix: str = "change nothing but the output") -> None:
    require(torch.equal(got, want), f"{what} (|diff| {difference(got, want):.1e})", fix=fix)


CHECKS = (
    off_is_exact,
    base_names_unchanged,
    only_adapter_gets_gradients,
    two_adapters_add_up,
    unmerge_is_exact,
    casts_and_copies,
    inference_keeps_nothing_else,
    half_precision_base,
    unsupported_layers_are_refused,
    refusals_say_why,
)
