"""The README of a recipe folder: why each number, and what to expect, in English and Chinese."""

from buddygpt.cli.tables import markdown_table
from buddygpt.planning import rules
from buddygpt.planning.hardware import GIB, Machine
from buddygpt.planning.recipe_files import Recipe, anneal_steps


def explain(recipe: Recipe, command: str, price_per_hour: float | None = None) -> str:
    """Return the README of a recipe.

    Args:
        recipe: The recipe.
        command: Command that made it.
        price_per_hour: Price of one GPU, or None.
    """
    parts = [
        f"# {recipe.name}",
        f"Made by `{command}`.\n\nStart, or continue after a stop: `bash {recipe.folder}/run.sh`; `--dry_run` checks "
        "every stage first. Edit any YAML before its stage runs. [中文](#中文)",
        "## What to expect",
        markdown_table(["", ""], expectations(recipe, price_per_hour), ["---", "---"]),
        *warning_lines(recipe, "Warning"),
        "## Why these numbers",
        markdown_table(["choice", "value", "reason"], choices(recipe), ["---"] * 3),
        "planning/rules.py cites the source of each rule. `python tools/benchmarks/sweep.py --text FOLDER` measures "
        "how far they are from the best choice on your text.",
        "## 中文",
        f"由 `{command}` 生成。\n\n启动（中断后用同一条命令接着跑）：`bash {recipe.folder}/run.sh`；加 `--dry_run` "
        "先检查所有阶段。每个 YAML 在对应阶段运行前都可以修改。",
        markdown_table(["", ""], expectations_zh(recipe, price_per_hour), ["---", "---"]),
        *warning_lines(recipe, "注意（warning）"),
        markdown_table(["选择", "值", "理由"], choices_zh(recipe), ["---"] * 3),
        "每条规则的出处写在 planning/rules.py。`python tools/benchmarks/sweep.py --text 文件夹` "
        "会在你的文本上测出这些选择离最优有多远。",
    ]
    return "\n\n".join(parts) + "\n"


def warning_lines(recipe: Recipe, word: str) -> list[str]:
    return [f"**{word}**: {warning}." for warning in recipe.plan.warnings]


def cost(recipe: Recipe, price_per_hour: float | None) -> str | None:
    if price_per_hour is None:
        return None
    count = recipe.machine.count if recipe.machine.kind == "gpu" else 1
    return f"{price_per_hour * recipe.hours * count:,.2f} ({count} x {recipe.hours:g} h x {price_per_hour:g})"


def expectations(recipe: Recipe, price_per_hour: float | None) -> list[list[str]]:
    plan, run = recipe.plan, recipe.plan.run
    size = run.shape.parameters
    rows = [
        ["machine", f"{recipe.machine.title}; {plan.speed.source}"],
        ["time", f"{recipe.hours:g} h in total: about {plan.prepare_seconds / 60:,.1f} min to prepare the text, "
                 f"{run.seconds / 60:,.1f} min of pretraining"],
        ["memory", f"{plan.peak / GIB:.2f} of {recipe.machine.usable / GIB:.1f} GiB at the peak of pretraining"],
        ["disk", f"{plan.disk / 1e9:,.1f} GB"],
        ["held-out text", f"about {plan.expected_bits:.2f} bits per byte: "
                          f"{rules.describe_expectation(size, run.tokens)}"],
    ]  # fmt: skip
    if price := cost(recipe, price_per_hour):
        rows.append(["money", price])
    return rows


def choices(recipe: Recipe) -> list[list[str]]:
    plan, run, shape = recipe.plan, recipe.plan.run, recipe.plan.run.shape
    ratio = run.tokens / shape.parameters
    rows = [
        ["size", f"{shape.parameters / 1e6:,.2f}M parameters", f"{ratio:,.1f} tokens per parameter; the rule for this "
         f"much computation is {rules.tokens_per_parameter(run.seconds * plan.speed.flops):.1f}"],
        ["shape", f"{shape.num_hidden_layers} layers, width {shape.hidden_size}", f"about {rules.ASPECT} times as "
         f"wide as deep, at least {rules.LEAST_LAYERS} layers"],
        ["vocabulary", f"{shape.vocab_size:,}", f"by the amount of text; at most {rules.EMBEDDING_SHARE:.0%} of all "
         "parameters"],
        ["tokens", f"{run.tokens / 1e6:,.1f}M, {plan.epochs:,.1f} times the text", "what the time allows; up to "
         f"{rules.GOOD_EPOCHS} times is nearly as good as new text"],
        ["batch", f"{run.batch:,} tokens, rows of {run.block_size}", "grows with the tokens"],
        ["optimizer", f"Muon, rate {run.learning_rate:g}; AdamW for the embedding, rate {run.embedding_rate:g}",
         f"AdamW needs {rules.adamw_needs(shape.parameters)} times the tokens; the rate falls with the size and grows "
         "with the batch"],
        ["schedule", schedule(recipe), f"warmup, stable, linear decay to {rules.END_OF_DECAY:.0%}"],
        ["weight decay", f"{rules.WEIGHT_DECAY}", "as the OLMo ladder"],
        ["SFT", f"{plan.sft.steps:,} steps, rate {plan.sft.learning_rate:g}", f"a fifth of the time, at most "
         f"{rules.SFT_EPOCHS} epochs"],
        ["DPO", f"{plan.dpo.steps:,} steps, rate {plan.dpo.learning_rate:g}", "a twentieth of the time and of the "
         "rate of SFT"],
    ]  # fmt: skip
    return rows


def schedule(recipe: Recipe) -> str:
    run = recipe.plan.run
    text = f"{run.steps:,} steps, {run.warmup_steps} of warmup"
    if recipe.inputs.anneal_sources:
        return f"{text}; the last {anneal_steps(run.steps):,} on better text"
    return f"{text}; the rate falls in the last {run.decay_steps:,}"


def schedule_zh(recipe: Recipe) -> str:
    run = recipe.plan.run
    text = f"{run.steps:,} 步，预热 {run.warmup_steps} 步"
    if recipe.inputs.anneal_sources:
        return f"{text}；最后 {anneal_steps(run.steps):,} 步换用更好的文本"
    return f"{text}；最后 {run.decay_steps:,} 步学习率下降"


def machine_zh(machine: Machine) -> str:
    if machine.kind == "cpu":
        return f"{machine.count} 核 CPU"
    return f"{machine.count} × {machine.name or f'{machine.memory / GIB:.1f} GiB 显卡'}"


def expectations_zh(recipe: Recipe, price_per_hour: float | None) -> list[list[str]]:
    plan, run = recipe.plan, recipe.plan.run
    rows = [
        ["硬件", f"{machine_zh(recipe.machine)}，约 {plan.speed.flops / 1e9:,.0f} GFLOP/s（依据见英文部分）"],
        ["时间", f"共 {recipe.hours:g} 小时：准备文本约 {plan.prepare_seconds / 60:,.1f} 分钟，预训练 "
                 f"{run.seconds / 60:,.1f} 分钟"],
        ["内存（显存）", f"预训练峰值 {plan.peak / GIB:.2f} GiB，可用 {recipe.machine.usable / GIB:.1f} GiB"],
        ["磁盘", f"{plan.disk / 1e9:,.1f} GB"],
        ["留出文本", f"约 {plan.expected_bits:.2f} 比特/字节（估算，依据见英文部分）"],
    ]  # fmt: skip
    if price := cost(recipe, price_per_hour):
        rows.append(["费用", price])
    return rows


def choices_zh(recipe: Recipe) -> list[list[str]]:
    plan, run, shape = recipe.plan, recipe.plan.run, recipe.plan.run.shape
    ratio = run.tokens / shape.parameters
    return [
        ["规模", f"{shape.parameters / 1e6:,.2f}M 参数", f"每个参数 {ratio:,.1f} 个 token"],
        ["形状", f"{shape.num_hidden_layers} 层，宽 {shape.hidden_size}", f"宽度约为层数的 {rules.ASPECT} 倍，至少 "
         f"{rules.LEAST_LAYERS} 层"],
        ["词表", f"{shape.vocab_size:,}", f"由文本量决定，且不超过参数总量的 {rules.EMBEDDING_SHARE:.0%}"],
        ["token 数", f"{run.tokens / 1e6:,.1f}M，文本读 {plan.epochs:,.1f} 遍",
         "时间允许多少就读多少；重复四遍以内与新文本相差不大"],
        ["批大小", f"{run.batch:,} token，每行 {run.block_size}", "随 token 总数增大"],
        ["优化器", f"Muon，学习率 {run.learning_rate:g}；嵌入层用 AdamW，学习率 {run.embedding_rate:g}",
         f"同样效果，AdamW 需要 {rules.adamw_needs(shape.parameters)} 倍的 token"],
        ["学习率曲线", schedule_zh(recipe), f"预热、稳定、线性降到 {rules.END_OF_DECAY:.0%}"],
        ["SFT", f"{plan.sft.steps:,} 步，学习率 {plan.sft.learning_rate:g}",
         f"占时间的五分之一，最多 {rules.SFT_EPOCHS} 遍"],
        ["DPO", f"{plan.dpo.steps:,} 步，学习率 {plan.dpo.learning_rate:g}",
         "占时间的二十分之一，学习率是 SFT 的二十分之一"],
    ]  # fmt: skip
