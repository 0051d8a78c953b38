"""PEFT: a LoRA on the experts of a folder: trained a few steps, saved, loaded again.

Reads a job (JSON) from standard input, writes the answer to the file that it names; ``clients.py`` says what they hold.
"""

import json
import sys
import tempfile
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Adapt ``gate_up_proj`` and ``down_proj`` of every layer's experts, and nothing else."""
    job = json.load(sys.stdin)
    torch.manual_seed(0)
    ids = torch.tensor(job["ids"])

    def load() -> AutoModelForCausalLM:
        return AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=torch.float32, trust_remote_code=job["remote_code"]
        )

    model = load()
    with torch.no_grad():
        before = model(input_ids=ids).logits
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    )
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trainable, lr=1e-2), []
    for _ in range(job["steps"]):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    adapted.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        trained = adapted(input_ids=ids).logits
        adapted.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(load(), folder).eval()
        reloaded = float((again(input_ids=ids).logits - trained).abs().max())
    answer = {
        "losses": losses,
        "trainable_parameters": sum(p.numel() for p in trainable),
        "on_experts": all("experts" in name for name in names),
        "moved": float((trained - before).abs().max()),
        "reloaded_difference": reloaded,
        "version": f"peft {peft.__version__}",
    }
    Path(job["answer"]).write_text(json.dumps(answer))


main()
