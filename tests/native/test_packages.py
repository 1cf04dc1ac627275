"""Why a package with kernels cannot be used, in one clause."""

from __future__ import annotations

import functools

from bico_ds.native.packages import install_refusal


def fake_distribution(folder, name, version, module_text):
    """A package of that name on sys.path with one module, `kernels_of_nobody`."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "kernels_of_nobody.py").write_text(module_text)


def test_a_package_that_is_missing_old_or_broken_is_refused_in_one_clause(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    ask = functools.partial(install_refusal, "none-such", "kernels_of_nobody", extra="x")
    assert "is not installed (pip install 'bico_ds[x]')" in ask(oldest="2.8")
    fake_distribution(tmp_path, "none-such", "2.8.1", "raise ImportError('undefined symbol: _ZN3c10')")
    assert "2.9 or newer is needed, 2.8.1 is installed" in ask(oldest="2.9")
    assert "2.8.1 is installed but does not load (undefined symbol: _ZN3c10)" in ask(oldest="2.8")
    (tmp_path / "kernels_of_nobody.py").write_text("")
    assert ask(oldest="2.8") is None


def test_another_flash_attention_is_not_taken_for_flash_attn_4(tmp_path, monkeypatch):
    """flash-attn 2.8 brings a flash_attn.cute of its own, with an older interface."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    for path in ("__init__.py", "cute/__init__.py", "cute/interface.py"):
        (tmp_path / "flash_attn" / path).write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    refusal = install_refusal("flash-attn-4", "flash_attn.cute.interface", extra="flash4", oldest="4.0.0b10")
    assert "is not installed" in refusal
