"""GPUs by name, by torch's name and by a user's file; a mistake in the file is told with its line."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import yaml

from bico_ds.common.errors import UserError
from bico_ds.config.paths import LocalPath
from bico_ds.planner.devices import _WORDS, DEVICES, Device, cpu_device, device_named, find_device

ANY = replace(DEVICES["h100-80g"], source="a data sheet")


def written(tmp_path, device: Device, **changes: object) -> str:
    """A YAML file of a GPU; a change to None leaves the key out."""
    values = {key: value for key, value in {**asdict(device), **changes}.items() if value is not None}
    (tmp_path / "gpu.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return str(tmp_path / "gpu.yaml")


@pytest.mark.parametrize(
    "name", ["a100-40g", "a100-80g", "h100-80g", "h200", "b200", "gb200", "l40s", "mi300x"]
)
def test_every_gpu_of_the_issue_is_found_by_its_name(name):
    assert find_device(name) is DEVICES[name] and find_device(LocalPath(name)).name == name


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_peaks_are_dense_and_links_go_one_way(device):
    """What data sheets print with sparsity, or for both directions, would be twice of this."""
    assert 70e12 <= device.bf16_flops <= 2500e12 and device.fp32_flops < device.bf16_flops
    assert device.link_bandwidth <= 900e9 and device.network_bandwidth <= 50e9 <= device.memory_bandwidth
    nominal = float(device.title.split(",")[1].removesuffix(" GB")) * 1e9
    assert 0.95 * nominal < device.memory_bytes < 1.08 * nominal  # a sheet's GB may be 2**30 bytes


# Multiprocessors or compute units; dense bf16 operations of each per cycle, with sums in fp32, and those of fp32; GHz
# boosted, for either. From the vendors' white papers on the architectures.
@pytest.mark.parametrize(
    ("name", "units", "bf16", "bf16_clock", "fp32", "fp32_clock"),
    [
        ("a100-40g", 108, 2048, 1.41, 128, 1.41),
        ("a100-80g", 108, 2048, 1.41, 128, 1.41),
        ("h100-80g", 132, 4096, 1.83, 256, 1.98),
        ("h100-pcie", 114, 4096, 1.62, 256, 1.755),
        ("h200", 132, 4096, 1.83, 256, 1.98),
        ("gh200", 132, 4096, 1.83, 256, 1.98),
        ("l40s", 142, 1024, 2.49, 256, 2.52),
        ("l40", 142, 512, 2.49, 256, 2.49),
        ("l4", 58, 1024, 2.04, 256, 2.04),
        ("a40", 84, 1024, 1.74, 256, 1.74),
        ("rtx-4090", 128, 512, 2.52, 256, 2.52),
        ("rtx-3090", 82, 512, 1.695, 256, 1.695),
        ("mi300x", 304, 2048, 2.1, 256, 2.1),
    ],
)
def test_peaks_are_those_of_the_units_and_their_clock(name, units, bf16, bf16_clock, fp32, fp32_clock):
    assert DEVICES[name].bf16_flops == pytest.approx(units * bf16 * bf16_clock * 1e9, rel=0.01)
    assert DEVICES[name].fp32_flops == pytest.approx(units * fp32 * fp32_clock * 1e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "links", "each"),
    [
        *((name, 12, 25e9) for name in ("a100-40g", "a100-80g")),
        *((name, 18, 25e9) for name in ("h100-80g", "h200", "gh200")),
        *((name, 18, 50e9) for name in ("b200", "gb200")),
        ("mi300x", 7, 64e9),
    ],
)
def test_the_link_of_a_node_is_all_nvlinks_of_a_gpu_in_one_direction(name, links, each):
    assert DEVICES[name].link_bandwidth == links * each


@pytest.mark.parametrize(
    ("torch_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100 80GB PCIe", "a100-80g"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100-PCIE-40GB", "a100-40g"),
        ("NVIDIA A40", "a40"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_gpu_is_known_by_torch_s_name(torch_name, name):
    assert device_named(torch_name) is DEVICES[name]


@pytest.mark.parametrize(
    "torch_name",
    [
        "NVIDIA A10G",
        "Tesla V100-SXM2-16GB",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 3090 Ti",
        "GRID A100-10C",
        "NVIDIA L40S-12Q",
        "AMD Instinct MI300X VF",
    ],
)
def test_other_variants_parts_and_virtual_gpus_are_not_known(torch_name):
    assert device_named(torch_name) is None


def test_every_gpu_of_the_table_has_a_name_of_torch_s():
    assert {ours for _, ours in _WORDS} == set(DEVICES)


def test_a_file_with_the_fields_of_a_gpu_is_one(tmp_path):
    mine = replace(ANY, name="mine", memory_bytes=12 * 2**30, per_node=3)
    assert find_device(written(tmp_path, mine)) == mine
    assert find_device(written(tmp_path, mine, kind=None)) == mine


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_byte": 1}, r"gpu\.yaml:13: memory_byte: unknown key \(did you mean 'memory_bytes'\?\)"),
        ({"per_node": None}, r"gpu\.yaml:1: per_node: this key is required"),
        ({"per_node": 0}, r"gpu\.yaml:10: per_node: must be at least 1, found 0: it counts the devices of a node"),
        ({"memory_bytes": 80}, r"gpu\.yaml:3: memory_bytes: must be at least 1,048,576, found 80"),
        ({"bf16_flops": "fast"}, r"gpu\.yaml:4: bf16_flops: must be a number, found 'fast'"),
        ({"link_bandwidth": float("nan")}, r"gpu\.yaml:7: link_bandwidth: must be a finite number"),
        ({"kind": "tpu"}, r"gpu\.yaml:12: kind: .*'cuda' or 'cpu'.*\(found 'tpu'\)"),
        ({"name": ""}, r"gpu\.yaml:1: name: "),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_told_with_its_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        find_device(written(tmp_path, ANY, **changes))


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "a GPU is a mapping of keys: name, "), ("a: [", "not valid YAML")]
)
def test_a_file_that_holds_no_mapping_is_refused(tmp_path, text, message):
    (tmp_path / "gpu.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        find_device(str(tmp_path / "gpu.yaml"))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("h100-80gb", "h100-80g"),
        ("H200", "h200' or 'h200-nvl"),
        ("H100", "h100-80g' or 'h100-pcie' or 'h100-nvl"),
        ("a100", "a100-40g' or 'a100-80g"),
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("mi300", "mi300x"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(name, nearest):
    with pytest.raises(UserError, match=rf"'{name}' is neither .*did you mean '{nearest}'"):
        find_device(name)


def test_an_unknown_name_of_a_recipe_is_refused_with_its_line():
    with pytest.raises(UserError, match=r"^mine\.yaml:7: distributed\.gpu: 'tpu' is neither"):
        find_device(LocalPath("tpu", where="mine.yaml:7: distributed.gpu"))


def test_the_ranks_of_a_host_share_its_memory():
    device = cpu_device(24 * 2**30, 5e10, 4)
    assert device.memory_bytes == 6 * 2**30 and device.per_node == 4 and device.kind == "cpu"
    assert device.peak_flops("bf16") == device.peak_flops("fp32") == 5e10
