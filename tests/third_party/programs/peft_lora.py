"""transformers and peft: a tiny BERT, created from a configuration; only low-rank adapters are trained."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

from tests.third_party.weights import record_weights


class Sentences(Dataset[Any]):
    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._words = torch.randint(1, 50, (size, 12), generator=generator)

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, index: int) -> Any:
        words = self._words[index]
        return {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words.sum() % 3}


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16, num_labels=3,
        )  # fmt: skip
        adapters = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=8, lora_dropout=0.1)
        self.model = get_peft_model(BertForSequenceClassification(config), adapters)
        self.accuracy = MulticlassAccuracy(3)
        self.save_hyperparameters({"lora": adapters.to_dict()})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        output = self.model(**batch)
        self.accuracy(output.logits, batch["labels"])
        self.log("val_loss", output.loss, sync_dist=True)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        schedule = get_linear_schedule_with_warmup(optimizer, 3, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        frozen = [name for name in checkpoint["state_dict"] if "lora_" not in name and "classifier" not in name]
        for name in frozen:
            del checkpoint["state_dict"][name]


def main() -> None:
    pl.seed_everything(1, workers=True)
    model = Classifier()
    trainer = pl.Trainer(
        strategy=sys.argv[1],
        accelerator="cpu",
        devices=2,
        max_epochs=3,
        accumulate_grad_batches=2,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=CSVLogger("logs"),
        callbacks=[ModelCheckpoint(monitor="val_loss", save_top_k=2)],
    )
    trainer.fit(
        model, DataLoader(Sentences(160, 0), batch_size=8, shuffle=True), DataLoader(Sentences(32, 1), batch_size=8)
    )
    record_weights(model)


if __name__ == "__main__":
    main()
