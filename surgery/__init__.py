"""Model surgery: take language-model checkpoints apart and put them together better, on the weights themselves.

    import surgery

    surgery.transfer("lab:grpo", "lab:sft", "lab:instruct", Path("OUT"), scale=0.5)

Names are imported on first use, because most bring torch along. Merges are in `merges`, probes in `probes`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from cli.commands.reproduce import reproduce
    from cli.commands.run import run_recipe
    from surgery.checkpoint.resolve import open_checkpoint
    from surgery.edits.experts import scale_experts
    from surgery.edits.heads import scale_heads
    from surgery.edits.undo_file import undo
    from surgery.engine.options import ExecutionOptions
    from surgery.engine.verification import verify
    from surgery.errors import SurgeryError
    from surgery.evaluation.evaluation_report import evaluate
    from surgery.growth.baseline import train_baselines
    from surgery.growth.data.tokenizer_training import train_tokenizer
    from surgery.growth.embedding.build import make_embedding
    from surgery.growth.layers.add import add_layers
    from surgery.growth.layers.initial_model import init_model
    from surgery.growth.prepare import load_plan, prepare_run
    from surgery.growth.run import grow
    from surgery.publish.upload import push
    from surgery.runtime.version import __version__
    from surgery.vectors.application import apply, transfer
    from surgery.vectors.comparison import compare, diff
    from surgery.vectors.extraction import extract
    from surgery.vectors.scale_sweep import sweep
    from surgery.vectors.to_lora import extract_adapter

__all__ = [
    "ExecutionOptions",
    "SurgeryError",
    "__version__",
    "add_layers",
    "apply",
    "compare",
    "diff",
    "evaluate",
    "extract",
    "extract_adapter",
    "grow",
    "init_model",
    "load_plan",
    "make_embedding",
    "open_checkpoint",
    "prepare_run",
    "push",
    "reproduce",
    "run_recipe",
    "scale_experts",
    "scale_heads",
    "sweep",
    "train_baselines",
    "train_tokenizer",
    "transfer",
    "undo",
    "verify",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "cli.commands.reproduce": ["reproduce"],
        "cli.commands.run": ["run_recipe"],
        "surgery.checkpoint.resolve": ["open_checkpoint"],
        "surgery.edits.experts": ["scale_experts"],
        "surgery.edits.heads": ["scale_heads"],
        "surgery.edits.undo_file": ["undo"],
        "surgery.engine.options": ["ExecutionOptions"],
        "surgery.engine.verification": ["verify"],
        "surgery.errors": ["SurgeryError"],
        "surgery.evaluation.evaluation_report": ["evaluate"],
        "surgery.growth.baseline": ["train_baselines"],
        "surgery.growth.data.tokenizer_training": ["train_tokenizer"],
        "surgery.growth.embedding.build": ["make_embedding"],
        "surgery.growth.layers.add": ["add_layers"],
        "surgery.growth.layers.initial_model": ["init_model"],
        "surgery.growth.prepare": ["load_plan", "prepare_run"],
        "surgery.growth.run": ["grow"],
        "surgery.publish.upload": ["push"],
        "surgery.runtime.version": ["__version__"],
        "surgery.vectors.application": ["apply", "transfer"],
        "surgery.vectors.comparison": ["compare", "diff"],
        "surgery.vectors.extraction": ["extract"],
        "surgery.vectors.scale_sweep": ["sweep"],
        "surgery.vectors.to_lora": ["extract_adapter"],
    },
)
