"""DeepSpeed's configuration: complete, known to DeepSpeed, and never 'auto'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from bico_ds.common.errors import UserError
from bico_ds.config.load import load_recipe
from bico_ds.config.resources import DS_CONFIGS
from bico_ds.runtime.ds_config import build_ds_config
from bico_ds.runtime.ds_keys import TOP_LEVEL_KEYS
from bico_ds.training.checks import check_recipe

NAMES = sorted(path.stem for path in DS_CONFIGS.glob("*.json"))


def built(name: str, *overrides: str, world_size: int = 2, on_cuda: bool = True) -> dict[str, Any]:
    recipe = load_recipe("tiny_bico", [f"deepspeed.config={name}", *overrides])
    return build_ds_config(
        recipe, world_size=world_size, hidden_size=128, on_cuda=on_cuda, run_folder=Path("runs/x")
    )


@pytest.mark.parametrize("name", NAMES)
def test_no_auto_is_left_in_any_shipped_configuration(name):
    assert '"auto"' not in json.dumps(built(name))


@pytest.mark.parametrize("name", NAMES)
def test_deepspeeds_own_models_accept_the_nested_keys_and_ours_the_top_level(name):
    config = built(name)
    assert set(config) - {"timers"} <= TOP_LEVEL_KEYS
    known = set(DeepSpeedZeroConfig.model_fields) | {
        f.alias for f in DeepSpeedZeroConfig.model_fields.values()
    }
    assert set(config["zero_optimization"]) <= known
    DeepSpeedZeroConfig(**config["zero_optimization"])
    DeepSpeedBF16Config(**config["bf16"])
    assert set(config.get("aio", {})) <= set(AIO_DEFAULT_DICT)


def test_the_batch_sizes_satisfy_deepspeeds_equation():
    config = built("zero3_bf16", "training.global_batch_bins=24", "training.micro_batch_bins=3", world_size=4)
    product = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 4
    assert config["train_batch_size"] == product == 24


def test_an_unknown_top_level_key_is_refused_with_a_suggestion():
    with pytest.raises(UserError, match="unknown top-level key 'zero_optimisation'.*'zero_optimization'"):
        built("zero3_bf16", "deepspeed.overrides.zero_optimisation.stage=2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["zero_optimization.stagge=3"], "zero_optimization.stagge'.*did you mean 'stage'"),
        (["zero_optimization.prefetch_bucket_size=7"], "did you mean 'stage3_prefetch_bucket_size'"),
        (["zero_optimization.stage=7"], "zero_optimization.stage: .*found 7"),
        (["zero_optimization.stage=0"], "zero_optimization.stage: give 1, 2 or 3 in zero3_bf16 or"),
        (["zero_optimization.offload_optimizer.device=disk"], "offload_optimizer.device: .*found 'disk'"),
        (["zero_optimization.offload_optimizer.devise=cpu"], "unknown key .*offload_optimizer.devise"),
        (["zero_optimization=5"], "'zero_optimization' must be a mapping of keys, found 5"),
        (["optimizer=AdamW"], "'optimizer' must be a mapping"),
        (["optimizer.params=5"], "'optimizer.params' must be a mapping"),
        (["train_batch_size=99"], "train_batch_size=99 .*set training.global_batch_bins instead"),
        (["gradient_clipping=0.5"], "set training.max_grad_norm instead"),
        (["bf16.enabled=true"], "set model.dtype instead"),
        (["optimizer.params.lr=1"], "set optimizer.lr instead"),
        (["optimizer.type=Lionn"], "'Lionn' is not one of AdamW, Adam"),
        (["steps_per_print=10"], "set monitor.every_steps instead"),
        (["bf16.check_grad_overflow=false"], "set training.on_nonfinite instead"),
        (
            ["data_types.grad_accum_dtyp=fp32"],
            "unknown key 'data_types.grad_accum_dtyp' .*'grad_accum_dtype'",
        ),
        (["checkpoint.tag_validatoin=FAIL"], "unknown key 'checkpoint.tag_validatoin' .*'tag_validation'"),
        (["flops_profiler.enabld=true"], "unknown key 'flops_profiler.enabld' .*'enabled'"),
        (["bf16.enabledd=true"], "unknown key 'bf16.enabledd' .*'enabled'"),
        (["aio.queue_depth=8"], "'aio' in .* changes nothing without an offload to NVMe"),
    ],
)
def test_what_deepspeed_would_refuse_or_the_recipe_owns_is_refused_here(overrides, message):
    with pytest.raises(UserError, match=message):
        built("zero3_bf16", *(f"deepspeed.overrides.{override}" for override in overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("activation_checkpointing.number_checkpoints=2", "set model.activation_checkpointing instead"),
        ("tensorboard.enabled=true", "set monitor.tensorboard instead"),
        ("csv_monitor.enabled=true", "set monitor.csv instead"),
        ("wandb.enabled=true", "set monitor.wandb instead"),
        ("seq_parallel_communication_data_type=fp32", "no sequence parallelism"),
        ("comms_logger.enabled=true", "nothing would print"),
        ("dump_state=true", "its log, which is off"),
        ("dump_state=null", "its log, which is off"),
        ("zero_allow_untested_optimizer=true", "among the tested ones"),
        ("zero_force_ds_cpu_optimizer=false", "built outside DeepSpeed"),
        ("checkpoint.writer.type=FAST", "checkpoints have another writer"),
        ("checkpoint.parallel_write.pipeline_stage=true", "only pipelines"),
        ("checkpoint.use_node_local_storage=true", "a disk that all nodes share"),
        ("checkpoint.load_universal=true", "a resume sets it"),
        ("zero_optimization.allgather_partitions=true", "reads it nowhere"),
        ("zero_optimization.stage3_gather_16bit_weights_on_model_save=true", "set checkpoint.export instead"),
        ("zero_optimization.save_muon_momentum_buffer_in_memory=true", "the optimizer Muon"),
        ("zero_optimization.override_module_apply=false", "own way to build a model"),
        ("zero_optimization.memory_efficient_linear=false", "own way to build a model"),
        ("zero_optimization.cpu_offload=true", "set offload_optimizer.device=cpu instead"),
        ("zero_optimization.cpu_offload_param=true", "set offload_param.device=cpu instead"),
        ("zero_optimization.compute_grad_norm=false", "clipping needs it"),
        ("zero_optimization.legacy_stage1=true", "no longer has it"),
        ("zero_optimization.zenflow={}", "against training.global_batch_bins"),
        ("zero_optimization.round_robin_gradients=true", "a resume with another value would mix them up"),
        ("zero_optimization.elastic_checkpoint=true", "cannot be resumed"),
        ("zero_optimization.load_from_fp32_weights=false", "needs the fp32 masters"),
        pytest.param(
            "zero_optimization.parameter_alignment=true",
            "no test of this project trains, saves and resumes",
            marks=pytest.mark.skipif(
                "parameter_alignment" not in DeepSpeedZeroConfig.model_fields,
                reason="this DeepSpeed does not know it",
            ),
        ),
        ("zero_optimization.leaf_module.classes=[Foo]", "no test of this project"),
        ("zero_optimization.stage3_module_granularity_threshold=9", "no test of this project"),
        ("zero_optimization.zero_quantized_weights=true", "no test of this project"),
        ("zero_optimization.offload_optimizer.ratio=0.5", "no test of this project"),
        ("zero_optimization.offload_optimizer.super_offload=true", "no test of this project"),
        ("zero_optimization.offload_optimizer.nvme_path=/x", "it is for device=nvme"),
        ("zero_optimization.offload_param.max_in_cpu=9", "it is for device=nvme"),
        ("gradient_predivide_factor=2.0", "does not multiply back"),
        ("prescale_gradients=true", "keeps fp16 gradients from overflowing"),
        ("optimizer.params.amsgrad=true", "third moment"),
        ("optimizer.params.maximize=true", "climb the loss"),
        ("checkpoint.checkpoint_serialization=false", "torch's zip format"),
        ("bf16.immediate_grad_update=true", "the bf16 optimizer of stage 1"),
        ("optimizer.legacy_fusion=true", "only fp16 without ZeRO"),
        ("data_types.param_dtype=fp32", "set model.dtype"),
        ("data_types.buffer_dtype=bf16", "rotary frequencies, which must stay in fp32"),
        ("data_types.keep_in_fp32_modules=auto", "stay in fp32 without it"),
        ("fp16.enabled=true", "set model.dtype"),
        ("amp.enabled=true", "set model.dtype"),
        ("torch_autocast.enabled=true", "set model.dtype"),
        ("scheduler.type=WarmupLR", "the recipe's schedule section"),
        ("compile.deepcompile=true", "not used here"),
        ("timers.throughput.enabled=false", "its log|DeepSpeed's log"),
        ("gradient_allreduce_op=sum", "the mean over the ranks"),
        ("disable_python_gc=true", "garbage collection"),
        ("log_level=info", "log is off"),
    ],
)
def test_a_key_that_deepspeed_knows_and_a_run_must_not_carry_is_refused_with_ours_named(override, message):
    key = override.split("=")[0]
    with pytest.raises(
        UserError, match=f"remove '.*' from zero3_bf16 or deepspeed.overrides: .*{message}"
    ) as raised:
        built("zero3_bf16", f"deepspeed.overrides.{override}")
    assert key.startswith(str(raised.value).split("'")[1])


@pytest.mark.parametrize(
    "override",
    [
        "flops_profiler.enabled=true",
        "wall_clock_breakdown=true",
        "memory_breakdown=true",
        "checkpoint.tag_validation=FAIL",
        "data_types.grad_accum_dtype=bf16",
        "flops_profiler.profile_step=3",
        "zero_optimization.use_multi_rank_bucket_allreduce=false",
    ],
)
def test_a_key_that_does_something_is_accepted(override):
    key, value = override.split("=")
    found = built("zero2_bf16", f"deepspeed.overrides.{override}")
    for part in key.split("."):
        found = found[part]
    assert str(found).lower() == value.lower()


def test_every_top_level_key_that_deepspeed_reads_is_set_by_the_recipe_or_refused_by_name():
    read = set()

    class Noted(dict):
        def get(self, key, default=None):
            read.add(key)
            return super().get(key, default)

        def __contains__(self, key):
            read.add(key)
            return super().__contains__(key)

        def keys(self):
            return self  # DeepSpeed asks `key in config.keys()`

        def __copy__(self):
            return self

    DeepSpeedConfig(Noted(train_batch_size=1))
    assert {"fp16", "zero_optimization", "scheduler", "compile"} <= read
    for key in sorted(read - TOP_LEVEL_KEYS):
        with pytest.raises(UserError, match=f"remove '{key}' from"):
            built("zero3_bf16", f"deepspeed.overrides.{key}=1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.params.foo=1", "optimizer.params: FusedAdam has no 'foo' in zero3_bf16 or"),
        ("optimizer.params.weight_decy=1", "has no 'weight_decy'.*did you mean 'weight_decay'"),
        ("optimizer.params.adamw_mode=false", "has no 'adamw_mode'.*did you mean 'adam_w_mode'"),
        ("optimizer.params.fused=true", "FusedAdam has no 'fused'"),
        ("data_types.grad_accum_dtype=foo", "grad_accum_dtype: 'foo' is not one of fp32, bf16"),
        ("data_types.grad_accum_dtype=fp16", "grad_accum_dtype: 'fp16' is not one of fp32, bf16"),
        ("communication_data_type=fp16", "communication_data_type"),
        ("data_types.grad_accum_dtype=int8", "grad_accum_dtype: 'int8' is not one of"),
        ("checkpoint.tag_validation=NOPE", r"tag_validation value of NOPE.*'FAIL'\].*in zero3_bf16 or"),
        ("communication_data_type=foo", "communication_data_type: 'foo' is not one of fp32, bf16 in"),
        ("communication_data_type=3", "communication_data_type: 3 is not one of fp32, bf16 in"),
        ("communication_data_type=[bf16]", r"communication_data_type: \['bf16'\] is not one of"),
        ("bf16.bf16_optimizer_states=true", "bf16_optimizer_states requires bf16_master_weights_and_grads"),
        ("bf16.bf16_optimizer_states=maybe", "DeepSpeedBF16Config.bf16_optimizer_states: .*found 'maybe'"),
        ("memory_breakdown=1", "memory_breakdown: must be true or false, found 1"),
        ("wall_clock_breakdown=maybe", "wall_clock_breakdown: must be true or false"),
        ("flops_profiler.profile_step=true", "flops_profiler.profile_step: must be a whole number"),
        ("flops_profiler.recompute_fwd_factor=x", "recompute_fwd_factor: must be a number"),
    ],
)
def test_a_value_that_deepspeed_would_stumble_over_is_one_message_of_one_line(override, message):
    with pytest.raises(UserError, match=message) as raised:
        built("zero3_bf16", f"deepspeed.overrides.{override}")
    assert "\n" not in str(raised.value)


def test_an_aio_value_of_the_wrong_kind_is_refused():
    with pytest.raises(UserError, match="aio.block_size: must be a whole number, found 'x'"):
        built("zero3_offload_nvme", "deepspeed.overrides.aio.block_size=x")


def test_the_parameters_are_those_of_the_optimizer_that_deepspeed_will_take():
    offloaded = built("zero3_offload_cpu", "deepspeed.overrides.optimizer.params.fp32_optimizer_states=true")
    assert offloaded["optimizer"]["params"]["fp32_optimizer_states"] is True
    with pytest.raises(UserError, match="`foreach` cannot be `True` together. in zero3_bf16 or"):
        built("zero3_bf16", "deepspeed.overrides.optimizer.params.foreach=true", on_cuda=False)
    with pytest.raises(UserError, match="AdamW has no 'bias_correction'"):
        built("zero3_bf16", "deepspeed.overrides.optimizer.params.bias_correction=true", on_cuda=False)


def test_master_weights_in_bf16_need_deepspeeds_cpu_adam():
    master = ("model.dtype=bf16", "deepspeed.overrides.bf16.bf16_master_weights_and_grads=true")
    assert built("zero3_offload_cpu", *master)["bf16"]["bf16_master_weights_and_grads"] is True
    for on_cuda, adam in ((True, "FusedAdam"), (False, "AdamW")):
        with pytest.raises(UserError, match=f"needs DeepSpeed's CPU Adam, .* and not {adam}"):
            built("zero3_bf16", *master, on_cuda=on_cuda)


def test_stage_1_is_refused_in_bf16_and_accepted_in_fp32():
    stage = "deepspeed.overrides.zero_optimization.stage=1"
    with pytest.raises(UserError, match=r"stage: give 2 in zero2_bf16 or .*model.dtype=fp32"):
        built("zero2_bf16", stage, "model.dtype=bf16")
    assert built("zero2_bf16", stage, "model.dtype=fp32")["zero_optimization"]["stage"] == 1


def test_letting_deepspeed_read_the_configuration_starts_and_prints_nothing(capfd):
    config = built("zero3_offload_nvme", "monitor.csv=true")
    assert not torch.distributed.is_initialized()
    assert capfd.readouterr() == ("", "")
    assert config["train_batch_size"] == 4


def test_a_file_that_leaves_out_what_the_recipe_owns_gets_it_all_the_same(tmp_path):
    file = tmp_path / "short.json"
    file.write_text(
        '{"zero_optimization": {"stage": 2}, "optimizer": {"params": {"lr": "auto", "torch_adam": true}}}'
    )
    short, shipped = built(str(file), "model.dtype=bf16"), built("zero2_bf16", "model.dtype=bf16")
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping", "bf16"):
        assert short[key] == shipped[key]
    assert short["optimizer"]["params"] == {**shipped["optimizer"]["params"], "torch_adam": True}
    assert short["optimizer"]["type"] == "AdamW"


def test_a_file_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="one JSON object"):
        built(str(tmp_path / "list.json"))


def test_a_monitor_that_is_not_installed_is_missed_before_the_run(monkeypatch):
    monkeypatch.setattr("bico_ds.runtime.ds_checks.find_spec", lambda name: None)
    with pytest.raises(UserError, match="'wandb' is not installed"):
        built("zero3_bf16", "monitor.wandb.project=x")


def test_an_auto_that_no_rule_fills_is_refused():
    with pytest.raises(UserError, match="aio.block_size"):
        built("zero3_offload_nvme", "deepspeed.overrides.aio.block_size=auto")


def test_overrides_reach_nested_keys_and_leave_the_rest():
    config = built("zero3_bf16", "deepspeed.overrides.zero_optimization.reduce_bucket_size=77")
    assert config["zero_optimization"]["reduce_bucket_size"] == 77
    assert config["zero_optimization"]["stage"] == 3


def test_a_global_batch_that_does_not_divide_names_the_three_numbers():
    with pytest.raises(UserError, match=r"\(4\).*\(2\).*\(3\)"):
        built("zero3_bf16", world_size=3)


def test_a_misspelt_configuration_gets_a_suggestion():
    with pytest.raises(UserError, match="did you mean 'zero3_bf16'"):
        built("zero3_bf61")


def test_the_recipe_s_precision_and_optimizer_reach_deepspeed():
    config = built("zero3_bf16", "model.dtype=bf16", "optimizer.lr=3e-4", on_cuda=False)
    assert config["bf16"] == {"enabled": True}
    assert config["optimizer"]["params"]["lr"] == 3e-4
    assert config["optimizer"]["params"]["torch_adam"] is True
    assert config["optimizer"]["params"]["fused"] is True
    assert "torch_adam" not in built("zero3_bf16")["optimizer"]["params"]


def test_hpz_needs_whole_nodes():
    recipe = load_recipe("tiny_bico", ["deepspeed.config=zero3_hpz", "training.global_batch_bins=24"])
    arguments = {"hidden_size": 128, "on_cuda": True, "run_folder": Path("runs/x")}
    with pytest.raises(UserError, match="12 ranks are no whole number of nodes of 8"):
        build_ds_config(recipe, world_size=12, ranks_per_node=8, **arguments)
    config = build_ds_config(recipe, world_size=12, ranks_per_node=4, **arguments)
    assert config["zero_optimization"]["zero_hpz_partition_size"] == 4


# Of fewer ranks than a group would have, all are one.
@pytest.mark.parametrize(("size", "bad", "good"), [(3, 4, 6), (8, 12, 4)])
def test_groups_of_hpz_must_divide_the_ranks(size, bad, good):
    overrides = [f"deepspeed.overrides.zero_optimization.zero_hpz_partition_size={size}"]
    recipe = load_recipe(
        "tiny_bico", ["deepspeed.config=zero3_hpz", "training.global_batch_bins=24", *overrides]
    )
    arguments = {"hidden_size": 128, "on_cuda": True, "run_folder": Path("runs/x")}
    with pytest.raises(
        UserError, match=f"partition_size: {bad} ranks cannot be divided into groups of {size}"
    ):
        build_ds_config(recipe, world_size=bad, **arguments)
    build_ds_config(recipe, world_size=good, **arguments)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_odd_gather_is_refused_where_deepspeed_would_end_in_an_assertion(stage):
    override = "deepspeed.overrides.zero_optimization.allgather_bucket_size=1501"
    if stage == 3:  # which reads it nowhere
        built("zero3_bf16", override)
        return
    with pytest.raises(UserError, match="allgather_bucket_size: must be even, found 1501"):
        built("zero2_bf16", override)


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_ranks_per_node_come_from_torchrun_or_deepspeeds_launcher(monkeypatch, variable):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "4")
    recipe = load_recipe("tiny_base", ["deepspeed.config=zero3_hpz", "training.global_batch_bins=24"])
    config = check_recipe(recipe, world_size=12, on_cuda=True, run_folder=Path("runs/x"))
    assert config["zero_optimization"]["zero_hpz_partition_size"] == 4


@pytest.mark.parametrize("name", NAMES)
def test_deepspeeds_throughput_timer_which_waits_for_the_device_is_off(name):
    config = {key: value for key, value in built(name).items() if key not in ("train_batch_size", "aio")}
    assert not DeepSpeedConfig(config).timers_config.enabled
