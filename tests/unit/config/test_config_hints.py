"""Names of other projects: what they are here, and which of their defaults differ."""

import dataclasses
import runpy
import shlex
from pathlib import Path
from textwrap import dedent

import pytest
from config_cases import write_config

from rlsys.cli import main
from rlsys.config import Config
from rlsys.config.elsewhere import counterparts, projects
from rlsys.config.fields import config_fields, first_sentence, show_value
from rlsys.config.hints import hint
from rlsys.config.load import load_config
from rlsys.config.pasted_command import split_command
from rlsys.problems import ProblemsError

ROOT = Path(__file__).parents[3]

MS_SWIFT = """
--rlhf_type grpo --model Qwen/Qwen2.5-3B-Instruct --external_plugins plugin.py --reward_funcs
external_countdown format --use_vllm true --vllm_device auto --vllm_gpu_memory_utilization 0.6
--train_type full --torch_dtype bfloat16 --dataset zouxuhong/Countdown-Tasks-3to4#50000
--max_length 2048 --max_completion_length 1024 --per_device_train_batch_size 8
--per_device_eval_batch_size 8 --learning_rate 5e-7 --gradient_accumulation_steps 8 --save_steps
100 --save_total_limit 20 --logging_steps 1 --warmup_ratio 0.01 --dataloader_num_workers 4
--num_generations 8 --temperature 1.0 --system helpful --deepspeed zero3 --log_completions true
--vllm_max_model_len 1024 --report_to wandb --beta 0.001 --num_iterations 1
"""

MEGATRON_SWIFT = """
--load Qwen2.5-7B-mcore --tensor_model_parallel_size 2 --sequence_parallel true
--micro_batch_size 16 --global_batch_size 16 --recompute_granularity full --recompute_method
uniform --recompute_num_layers 1 --finetune true --cross_entropy_loss_fusion true --lr 1e-5
--lr_warmup_fraction 0.05 --min_lr 1e-6 --max_epochs 1 --save out --save_interval 100
--num_workers 4 --no_save_optim true --no_save_rng true --dataset_num_proc 4 --model_author
swift --model_name robot --expert_model_parallel_size 8 --moe_permute_fusion true
--moe_grouped_gemm true --packing true --moe_shared_expert_overlap true --moe_aux_loss_coeff
1e-3 --eval_interval 200 --tuner_type lora --attention_backend flash
--pipeline_model_parallel_layout x --fp8_recipe blockwise --lora_rank 16 --padding_free false
--group_by_length true --mtp_num_layers 1 --save_safetensors true --load_from_cache_file true
--add_non_thinking_prefix true --merge_lora true --loss_scale x
"""

VERL = """
algorithm.adv_estimator=grpo data.train_files=x.parquet data.val_files=y.parquet
data.train_batch_size=1024 data.max_prompt_length=512 data.max_response_length=1024
data.filter_overlong_prompts=True data.truncation=error
actor_rollout_ref.model.path=Qwen/Qwen2-7B actor_rollout_ref.actor.optim.lr=1e-6
actor_rollout_ref.model.use_remove_padding=True actor_rollout_ref.actor.ppo_mini_batch_size=256
actor_rollout_ref.actor.kl_loss_coef=0.001
actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16 actor_rollout_ref.actor.use_kl_loss=True
actor_rollout_ref.actor.kl_loss_type=low_var_kl actor_rollout_ref.actor.entropy_coeff=0
actor_rollout_ref.model.enable_gradient_checkpointing=True
actor_rollout_ref.actor.fsdp_config.param_offload=False
actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16
actor_rollout_ref.rollout.tensor_model_parallel_size=2 actor_rollout_ref.rollout.name=vllm
actor_rollout_ref.rollout.gpu_memory_utilization=0.6 actor_rollout_ref.rollout.n=5
actor_rollout_ref.ref.fsdp_config.param_offload=True algorithm.use_kl_in_reward=False
trainer.critic_warmup=0 trainer.logger=[console,wandb] trainer.project_name=p
trainer.experiment_name=e trainer.n_gpus_per_node=8 trainer.nnodes=1 trainer.save_freq=20
trainer.test_freq=5 trainer.total_epochs=15
"""

OPENRLHF = """
--actor_num_nodes 1 --actor_num_gpus_per_node 8 --vllm_num_engines 4 --gamma 1.0
--vllm_tensor_parallel_size 2 --colocate_all_models --vllm_gpu_memory_utilization 0.6
--advantage_estimator group_norm --pretrain m --save_path s --ckpt_path c --save_hf_ckpt
--micro_train_batch_size 1 --train_batch_size 1024 --micro_rollout_batch_size 4
--rollout_batch_size 256 --n_samples_per_prompt 8 --max_epochs 1 --num_episodes 20
--prompt_max_len 1024 --max_samples 100 --generate_max_len 1024 --temperature 0.6 --zero_stage 3
--bf16 --actor_learning_rate 5e-6 --prompt_data d --input_key i --label_key l --save_steps 10
--flash_attn --init_kl_coef 0.0 --load_checkpoint --use_wandb k --wandb_run_name r
--wandb_project p --max_ckpt_num 5 --normalize_reward --adam_offload --gradient_checkpointing
--vllm_sync_backend nccl --packing_samples --enforce_eager
"""


def names_of(command):
    words = command.split()
    return [word.lstrip("-").partition("=")[0] for word in words if "--" in word or "=" in word]


@pytest.mark.parametrize("command", [MS_SWIFT, MEGATRON_SWIFT, VERL, OPENRLHF])
def test_every_flag_of_a_whole_command_has_an_answer(command):
    silent = [name for name in names_of(command) if name not in config_fields() and not hint(name)]
    assert set(silent) <= {"model"}  # a section, which is said with model.path


@pytest.mark.parametrize(
    ("command", "project"),
    [(MS_SWIFT, "ms-swift"), (VERL, "verl"), (OPENRLHF, "OpenRLHF")],
)
def test_a_command_behind_rlsys_grpo_is_answered_with_one_list(command, project, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["grpo", *command.split()])
    error = capsys.readouterr().err
    assert "CONFIG, a YAML file, should stand before" in error
    names = [name for name in names_of(command) if name not in config_fields()]
    for name in names:
        assert f"  - --{name}: " in error or f"  - {name}: " in error
    assert f"has {len(names)} problems:" in error
    assert f"These are names of {project}: docs/migration.md" in error


def test_a_command_behind_a_config_is_answered_too(tmp_path):
    with pytest.raises(ProblemsError) as caught:
        load_config(write_config(tmp_path), MS_SWIFT.split())
    assert len(caught.value.problems) == len(names_of(MS_SWIFT))
    note = str(caught.value).partition("These are names of")[2].partition("What means")[0]
    lines = note.splitlines()
    assert "  policy.lr_scheduler_type constant (cosine there)" in lines
    assert "  policy.weight_decay 0 (0.1 there)" in lines
    assert "  policy.adam_beta2 0.999 (0.95 there)" in lines
    assert "policy.lr " not in note  # given


FRONTS = [
    ("swift rlhf", "ms-swift"),
    ("NPROC_PER_NODE=8 CUDA_VISIBLE_DEVICES=0,1 swift rlhf", "ms-swift"),
    ("megatron rlhf", "ms-swift"),
    ("torchrun --nproc_per_node 8 -m swift.cli.rlhf", "ms-swift"),
    ("trl grpo", "TRL"),
    ("python3 -u -m verl.trainer.main_ppo", "verl"),
    ("ray job submit --address=http://a:1 -- python3 -m openrlhf.cli.train_ppo_ray", "OpenRLHF"),
    ("accelerate launch --config_file zero3.yaml --num_processes=8 src/train.py", None),
    ("python -m torch.distributed.run --nproc-per-node=8 train.py", None),
    ("env A=1 uv run train.py", None),
]


@pytest.mark.parametrize(("front", "project"), FRONTS)
def test_the_program_of_another_project_is_taken_away(front, project):
    command = split_command([*front.split(), "--beta", "1", "x.lr=2"])
    assert command.project == project
    variables = [word for word in command.options if word.startswith("NPROC_PER_NODE")]
    assert variables == (["NPROC_PER_NODE=8"] if "8" in front else [])
    assert command.options == [*variables, "--beta", "1", "x.lr=2"]
    said = " ".join(map(str, command.problems()))
    for word in front.split():
        assert word in said or word in variables


def test_options_of_rlsys_are_no_program():
    words = ["--data.dataset", "train.py", "model.path=swift"]
    command = split_command(words)
    assert command.options == words
    assert command.problems() == []


@pytest.mark.parametrize("front", ["", "swift rlhf", "NPROC_PER_NODE=8 swift rlhf"])
def test_a_pasted_command_is_translated_into_a_config(front, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main(["grpo", *front.split(), *MS_SWIFT.split(), "--num_workers", "3", "--max_steps", "9"])
    error = capsys.readouterr().err
    assert "verl: " not in error
    assert "max_steps means something else there: One step is one rollout here" in error
    assert error.count("policy.recompute none") == 1
    text = error.partition("to start from and to check:\n\n")[2].partition("Still to set: ")[0]
    path = tmp_path / "start.yaml"
    path.write_text(dedent(text))
    with path.open("a") as file:
        file.write("output_dir: runs/a\nmax_steps: 1\n")
    config = load_config(path, ["--rollout.generation_batch_size", "64"]).config
    assert config.model.path == "Qwen/Qwen2.5-3B-Instruct"
    assert config.data.dataset == ["zouxuhong/Countdown-Tasks-3to4#50000"]
    assert config.reward.reward_funcs == ["external_countdown", "format"]
    assert config.policy.lr == 5e-7
    assert config.policy.world_size == (8 if "NPROC" in front else 1)
    assert config.checkpoint.save_steps == "auto"  # steps of another unit


def test_a_translation_says_what_it_lacks(capsys):
    words = "swift rlhf --model m --train_type lora --num_generations 8 --dataset d --beta 0.1"
    with pytest.raises(SystemExit, match="2"):
        main(["grpo", *words.split(), "--gradient_accumulation_steps", "4", "--top_p", "x"])
    error = capsys.readouterr().err
    last = error.rstrip().splitlines()[-1]
    assert last.startswith("Still to set: output_dir, ")
    assert "rollout.generation_batch_size" in last
    assert (
        "max_steps or num_train_epochs; not translated: --train_type, "
        "--gradient_accumulation_steps, --top_p" in last
    )
    assert "  - --num_generations: -> rollout.num_generations. G, completions per" in error
    assert "  - --train_type: there is no such field. Did you mean 'policy.lora'?" in error
    assert "\n  policy.lr_scheduler_type constant (cosine there)\n" in error


def test_a_command_pasted_behind_a_config_is_translated_into_options(tmp_path):
    path = write_config(tmp_path)
    words = ["swift", "rlhf", "--model", "a b", "--beta", "0.04", "--rollout.top_p", "0.9"]
    with pytest.raises(ProblemsError, match="swift rlhf: leave it out") as caught:
        load_config(path, words)
    line = str(caught.value).splitlines()[-1]
    command = shlex.split(line)
    assert command[:3] == ["rlsys", "explain", str(path)]
    config = load_config(path, command[3:]).config
    assert (config.model.path, config.grpo.beta, config.rollout.top_p) == ("a b", 0.04, 0.9)


def test_a_config_file_of_trl_is_answered(tmp_path):
    path = write_config(tmp_path, learning_rate=1e-6, bf16=True, gradient_checkpointing=True)
    with pytest.raises(ProblemsError) as caught:
        load_config(path, ["--use_vllm", "--vllm_mode", "colocate"])
    assert "These are names of TRL" in str(caught.value)
    assert "grpo.loss_type grpo (dapo there)" in str(caught.value)
    assert "grpo.use_bias_correction_kl false (true there)" in str(caught.value)


def test_a_config_file_of_verl_is_answered_name_by_name(tmp_path):
    path = tmp_path / "verl.yaml"
    path.write_text(
        "algorithm: {adv_estimator: grpo}\n"
        "data: {train_files: a.parquet, train_batch_size: 64}\n"
        "actor_rollout_ref:\n"
        "  model: {path: m}\n"
        "  actor: {optim: {lr: 1e-6}, ppo_mini_batch_size: 16}\n"
        "  rollout: {n: 5, nothing_known: 1}\n"
    )
    with pytest.raises(ProblemsError) as caught:
        load_config(path)
    text = str(caught.value)
    for name, field in {
        "algorithm.adv_estimator": "grpo.advantage_estimator",
        "data.train_files": "data.dataset",
        "data.train_batch_size": "rollout.generation_batch_size",
        "actor_rollout_ref.model.path": "model.path",
        "actor_rollout_ref.actor.optim.lr": "policy.lr",
        "actor_rollout_ref.rollout.n": "rollout.num_generations",
    }.items():
        assert f"  - {name}: there is no such field. Did you mean {field!r}?" in text
    assert "  - actor_rollout_ref.rollout.nothing_known: there is no such field.\n" in text
    assert "These are names of verl" in text


def test_a_slip_does_not_look_like_another_project(tmp_path):
    with pytest.raises(ProblemsError) as caught:
        load_config(write_config(tmp_path), ["--learning_rate", "1"])
    assert "These are names of" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("train_type", "'policy.lora'? Train adapters"),
        ("lora_rank", "'policy.lora.rank'?"),
        ("use_dora", "Not supported: "),
        ("rollout.num_beams", "Not supported: "),
        ("deepspeed", "Not needed: megatron-core shards"),
        ("data.train_batch_size", "verl counts prompts, rlsys completions"),
        ("critic.optim.lr", "Not needed: GRPO has no critic"),
        ("actor_rollout_ref.actor.shuffle", "Not needed: Mini-batches are drawn by seed"),
        ("cosine_max_len", "'reward.reward_params'"),
        ("NPROC_PER_NODE", "'policy.world_size'"),
        ("num_workers", "'reward.num_workers'? ms-swift: Not needed: Prompts are read"),
        ("max_epochs", "'num_train_epochs' or 'grpo.num_iterations'?"),
        ("actor_rollout_ref.rollout.n", "'rollout.num_generations'"),
    ],
)
def test_an_answer_says_what_is_not_needed_and_what_differs(name, says):
    assert says in hint(name)


def test_the_table_is_about_fields_that_there_are():
    fields = config_fields()
    for row in counterparts(Config):
        assert set(row.fields) <= set(fields), row
        assert row.fields or row.note, row
        assert not row.default or row.fields, row
        assert row.note == "" or row.note.endswith("."), row
        # What rlsys can do is not said to be missing.
        if not row.fields:
            own = {field.rpartition(".")[2] for field in fields} - {"num_workers"}
            assert not own & {name for name in row.names if "." not in name}, row
    for project in projects(Config):
        rows = [row for row in counterparts(Config) if row.project == project]
        names = [name for row in rows for name in row.names]
        assert len(names) == len(set(names)), project


def test_every_field_of_trls_config_is_in_the_table():
    from trl import GRPOConfig, ModelConfig
    from trl.scripts.grpo import GRPOScriptArguments

    rows = {name: row for row in counterparts(Config) if row.project == "TRL" for name in row.names}
    kinds = (GRPOScriptArguments, ModelConfig, GRPOConfig)
    theirs = {field.name: field for kind in kinds for field in dataclasses.fields(kind)}
    assert sorted(set(theirs) - set(rows)) == []
    assert sorted(set(rows) - set(theirs)) == ["datasets", "warmup_ratio"]  # YAML, older
    ours = {name.rpartition(".")[2]: name for name in config_fields()}
    for name, field in theirs.items():
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()
        row = rows[name]
        if row.default:
            assert row.default == show_value(default), name
        elif name in ours and ours[name] in row.fields and name not in ("max_steps", "output_dir"):
            assert row.note, f"{name}: say the default, or what differs"


def test_a_hint_tells_what_the_field_counts():
    meaning = first_sentence(config_fields()["policy.lr"].description)
    assert hint("learning_rate") == f" Did you mean 'policy.lr'? {meaning}"


def test_the_page_of_migration_is_current():
    script = runpy.run_path(str(ROOT / "scripts" / "migration_docs.py"))
    page = (ROOT / "docs" / "migration.md").read_text("utf-8")
    assert page == script["markdown"](), "run: python scripts/migration_docs.py"
