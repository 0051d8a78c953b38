"""TRL: a few steps of ``SFTTrainer`` on a folder.

Reads a job (JSON) from standard input, writes the answer to the file that it names; ``clients.py`` says what they hold.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Full fine-tuning on the job's texts, the same batch every step so that the loss must fall."""
    job = json.load(sys.stdin)
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, trust_remote_code=job["remote_code"]
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "experts" in name}
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.SFTConfig(
            output_dir=folder,
            max_steps=job["steps"],
            per_device_train_batch_size=len(job["texts"]),
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_length=64,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            seed=0,
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_dict({"text": job["texts"]}),
            processing_class=AutoTokenizer.from_pretrained(job["model"], trust_remote_code=job["remote_code"]),
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    moved = [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])]
    answer = {
        "losses": losses,
        "expert_tensors": len(before),
        "expert_tensors_moved": len(moved),
        "version": f"trl {trl.__version__}",
    }
    Path(job["answer"]).write_text(json.dumps(answer))


main()
