"""What a run resumes from: the entries of its checkpoint, checked."""
import json
from pathlib import Path

import torch

from nets.layout import from_published, to_published
from tools.checkpoint import load_checkpoint
from tools.cli import InputError
from tools.manifest import check_fields, is_count, is_list_of

BY_DEVICE = ("fused", "foreach")  # how an optimiser computes, which the device decides and not the file
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # of Adam and AdamW, for each parameter


def _is_config(value) -> bool:
    try:
        return isinstance(value, dict) and bool(json.dumps(value))
    except (TypeError, ValueError, RecursionError):
        return False


def _are_names(value) -> bool:
    return isinstance(value, list) and all(type(name) is str for name in value)


# name -> whether a value can be its, and what stands for a missing one: versions 1 and 2 did not have all of them
ENTRIES = {
    "config": (_is_config, None),
    "step": (is_count, None),
    "best": (lambda value: value is None or type(value) is float, None),
    "scenes": (_are_names, None),
    "bad": (lambda value: is_list_of(int, list)(value) and all(_are_names(names) for _, names in value), []),
    "draw_size": (lambda value: value is None or is_count(value), None),
    "validation_due": (lambda value: type(value) is bool, False),
    "skipped": (is_list_of(str, str, int), []),
}


def read_state(path) -> dict:
    """A checkpoint of a run, or the latest in its folder, with all ENTRIES and its `path`.

    InputError if it is missing or damaged, or holds weights alone.
    """
    path = Path(path) / "latest.pth" if Path(path).is_dir() else Path(path)
    content = load_checkpoint(path)
    if "optimizer" not in content:
        raise InputError(f"{path} holds weights alone, which is too little to resume from: give it as weight_path")
    content = check_fields(content, ENTRIES, path)
    return {**content, "config": json.loads(json.dumps(content["config"])), "path": path}  # no numbers of NumPy's


def _parameter_names(matcher, optimizer: torch.optim.Optimizer) -> list[str]:
    """In the order in which an optimiser's state numbers them."""
    names = {parameter: name for name, parameter in matcher.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _convert(convert, names: list[str], state: dict) -> dict:
    """An optimiser's state with its moments in another layout, as their weights."""
    return {**state, "state": {i: {entry: value if entry == "step" else convert(names[i], value)
                                   for entry, value in moments.items()} for i, moments in state["state"].items()}}


def optimizer_state(matcher, optimizer: torch.optim.Optimizer) -> dict:
    """The state of Adam or AdamW, in the layout of published weights."""
    return _convert(to_published, _parameter_names(matcher, optimizer), optimizer.state_dict())


def load_optimizer(matcher, optimizer: torch.optim.Optimizer, state, path) -> None:
    """Load what `optimizer_state` gave, from the checkpoint `path`; InputError if it cannot be resumed from."""
    names = _parameter_names(matcher, optimizer)
    problem = _problem(state, optimizer, names)
    if problem:
        raise InputError(f"{path} is damaged: its optimizer {problem}; resume from an earlier epoch's file")
    state = _convert(from_published, names, state)
    groups = [{**theirs, **{name: own[name] for name in BY_DEVICE}}
              for theirs, own in zip(state["param_groups"], optimizer.param_groups)]
    optimizer.load_state_dict({**state, "param_groups": groups})


def _problem(state, optimizer: torch.optim.Optimizer, names: list[str]) -> str:
    """Why Adam or AdamW cannot resume from a state; "" if it can."""
    own = optimizer.state_dict()["param_groups"]
    groups, moments = (state.get("param_groups"), state.get("state")) if isinstance(state, dict) else (None, None)
    if not isinstance(groups, list) or len(groups) != len(own) or not isinstance(moments, dict):
        return f"has not the {len(own)} groups of parameters of this run"
    for theirs, ours in zip(groups, own):
        if not isinstance(theirs, dict) or type(theirs.get("lr")) is not float:
            return "lacks a learning rate"
        for name, value in ours.items():
            if name not in ("lr", *BY_DEVICE) and repr(theirs.get(name, value)) != repr(value):
                return f"says {name} {str(theirs[name])[:50]}, not {str(value)[:50]}"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if moments and moments.keys() != set(range(len(parameters))):  # before the first step there are none
        return f"holds moments of {len(moments)} parameters that are not the {len(parameters)} of this run"
    for i, values in moments.items():
        if not isinstance(values, dict) or set(values) != MOMENTS:
            return f"holds something else than {', '.join(sorted(MOMENTS))} of parameter {i}"
        for name, value in values.items():
            shape = () if name == "step" else to_published(names[i], parameters[i]).shape
            if not (torch.is_tensor(value) and value.layout == torch.strided and value.is_floating_point()
                    and value.shape == shape and value.isfinite().all() and (name == "exp_avg" or (value >= 0).all())):
                return f"holds a {name} of parameter {i} that cannot be"
    return ""
