"""Other tools that look into a training run, each used every step as its documentation says.

They are installed into an environment of their own, beside the packages of this one: the same torch, the
same transformers, and nothing here changes.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

#: What is called with the number of the step after the backward pass and before the optimizer.
AfterBackward = Callable[[int], object]
Attach = Callable[[nn.Module, Path], AfterBackward | None]


@dataclass(frozen=True)
class Peer:
    """A tool.

    Attributes:
        records: what it looks at.
        distribution: what pip installs.
        attach: (model, folder for its files) → what is called after each backward pass, if anything.
        beside: what must be installed with it.
    """

    records: str
    distribution: str
    attach: Attach
    beside: tuple[str, ...] = ()


def _wandb(log: str) -> Attach:
    # https://docs.wandb.ai/ref/python/sdk/classes/run: watch(models, log=..., log_freq=...)
    def attach(model: nn.Module, folder: Path) -> AfterBackward:
        import wandb

        run = wandb.init(mode="offline", dir=folder, project="overhead")
        run.watch(model, log=log, log_freq=1)
        return lambda step: run.log({"step": step})

    return attach


def _lightning(model: nn.Module, folder: Path) -> AfterBackward:
    # https://lightning.ai/docs/pytorch/stable/debug/debugging_intermediate.html: in
    # on_before_optimizer_step, norms = grad_norm(self, norm_type=2); self.log_dict(norms)
    from lightning.pytorch.utilities import grad_norm

    return lambda step: grad_norm(model, norm_type=2)


def _torchexplorer(model: nn.Module, folder: Path) -> None:
    # https://github.com/spfrommer/torchexplorer: watch(model, log_freq=..., backend=...)
    import torchexplorer

    torchexplorer.watch(model, log_freq=1, backend="none", verbose=False)


_INSPECT = """\
overhead:
  enabled: True
  layers:
    layer_name_regex_pattern: .*
  LogTensorStats:
    enabled: True
    tensors: [activation, gradient, weight_gradient]
    stats: [min, max, mean, std, l2_norm]
    freq: 1
"""


def _inspect(model: nn.Module, folder: Path) -> AfterBackward:
    # https://github.com/NVIDIA/nvidia-dlfw-inspect, examples/test_simple_model_train.py: the user calls
    # log_tensor_stats on each tensor, and step() once per step. The statistics are those of gradscope
    # that it has, of the output of every leaf module, its gradient and the parameters' gradients.
    import nvdlfw_inspect.api as inspect

    config = folder / "config.yaml"
    config.write_text(_INSPECT)
    inspect.initialize(config_file=str(config), log_dir=str(folder))

    def log(name: str, kind: str, tensor: Tensor) -> None:
        inspect.log_tensor_stats(name, tensor=tensor.detach(), tensor_name=kind, skip_reduction=True)

    def watch(name: str, module: nn.Module) -> None:
        def seen(module: nn.Module, args: Any, output: Tensor) -> None:
            log(name, "activation", output)
            if output.requires_grad:
                output.register_hook(lambda grad: log(name, "gradient", grad))

        module.register_forward_hook(seen)

    for name, module in model.named_modules():
        if not list(module.children()):
            watch(name, module)

    def after_backward(step: int) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                log(name, "weight_gradient", parameter.grad)
        inspect.step()

    return after_backward


def _underflow(model: nn.Module, folder: Path) -> None:
    # https://huggingface.co/docs/transformers/debugging: DebugUnderflowOverflow(model)
    from transformers.debug_utils import DebugUnderflowOverflow

    DebugUnderflowOverflow(model)


def _tensorboard(model: nn.Module, folder: Path) -> AfterBackward:
    # https://docs.pytorch.org/docs/stable/tensorboard.html: add_histogram(tag, values, step)
    from torch.utils.tensorboard.writer import SummaryWriter

    writer = SummaryWriter(folder)

    def after_backward(step: int) -> None:
        for name, parameter in model.named_parameters():
            writer.add_histogram(name, parameter, step)
            writer.add_histogram(f"{name}.grad", parameter.grad, step)
        writer.flush()  # else its thread works on during the turn of the other model

    return after_backward


PEERS = {
    'wandb.watch(log="all")': Peer(
        "histograms of parameters and their gradients", "wandb", _wandb("all")
    ),
    'wandb.watch(log="gradients")': Peer(
        "histograms of parameter gradients", "wandb", _wandb("gradients")
    ),
    "Lightning grad_norm": Peer("norms of parameter gradients", "lightning", _lightning),
    "torchexplorer": Peer(
        "histograms of inputs, outputs, their gradients, parameters and theirs, of a sample of each",
        "torchexplorer",
        _torchexplorer,
    ),
    "nvdlfw-inspect LogTensorStats": Peer(
        "min, max, mean, std, norm of leaf outputs, their gradients and parameter gradients",
        "nvdlfw-inspect",
        _inspect,
    ),
    "DebugUnderflowOverflow": Peer(
        "min and max of weights, inputs and outputs of every module",
        "transformers",
        _underflow,
    ),
    "TensorBoard histograms": Peer(
        "histograms of parameters and their gradients", "tensorboard", _tensorboard, ("setuptools",)
    ),
}

#: Their versions here are those of the peers' environment: what is measured is the same torch.
_SHARED = ("torch", "numpy", "transformers")

# torchexplorer calls graphviz's program, which pygraphviz brings as a library only.
_DOT = """\
#!{python}
import os, sys
errors = os.dup(2)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the caller takes any warning for an error
try:
    import pygraphviz
    format = next(a[2:] for a in sys.argv if a.startswith("-T"))
    graph = pygraphviz.AGraph(string=sys.stdin.buffer.read().decode())
    sys.stdout.buffer.write(graph.draw(prog="dot", format=format))
except Exception as error:
    os.write(errors, repr(error).encode())
"""


def install(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, str]]:
    """Make the environment.

    Returns:
        Its Python, and what pip said of each distribution that it could not install.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        say(f"an environment for the peers in {folder}")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
        here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
        lines = [f"import site; site.addsitedir({path!r})" for path in sorted(here)]
        (Path(own.stdout.strip()) / "beside.pth").write_text("\n".join(lines) + "\n")
    constraints = folder / "constraints.txt"
    pins = [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in _SHARED]
    constraints.write_text("\n".join(pins) + "\n")
    failed: dict[str, str] = {}
    for peer in {p.distribution: p for p in PEERS.values()}.values():
        say(f"installing {peer.distribution}")
        names = [peer.distribution, *peer.beside]
        command = [python, "-m", "pip", "install", "-q", "-c", str(constraints), *names]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            failed[peer.distribution] = (said or done.stderr.splitlines() or ["pip failed"])[-1]
    if shutil.which("dot") is None:
        program = folder / "bin" / "dot"
        program.write_text(_DOT.format(python=python))
        program.chmod(0o755)
    return python, failed


def environment(python: Path) -> dict[str, str]:
    """The variables that a peer's process gets: its programs are found, and nothing goes online."""
    return {
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "NVDLFW_INSPECT_LOG_LEVEL": "WARNING",
    }


def version(distribution: str) -> str:
    """The installed version, in the peers' environment."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return ""
