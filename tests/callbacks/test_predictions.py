from __future__ import annotations

import json

import lightning.pytorch as pl

from lightrft_lightning import PromptDataModule, RLHFModule, SamplingParams, TransformersRollout
from lightrft_lightning.callbacks import WritePredictions


def test_one_line_a_completion(tiny_model, tiny_tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.jsonl").write_text("from an older run\n")
    sampling = SamplingParams(n=2, max_new_tokens=5)
    module = RLHFModule(tiny_model, lambda completion: 0.0, tiny_tokenizer, val_sampling=sampling, seed=0)
    writer = WritePredictions(dirpath=str(tmp_path / "out"))
    trainer = pl.Trainer(
        strategy="lightrft_fake", accelerator="cpu", callbacks=[TransformersRollout(), writer], logger=False,
        enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    batches = trainer.predict(module, datamodule=PromptDataModule(predict=["1+1=", "2+2=", "3+3="], batch_size=2))
    rows = [json.loads(line) for line in writer.path.read_text().splitlines()]
    assert rows == [completion for batch in batches for completion in batch]
    assert [row["prompt"] for row in rows] == ["1+1=", "1+1=", "2+2=", "2+2=", "3+3=", "3+3="]
    assert set(rows[0]) == {"prompt", "completion", "token_ids", "finish_reason"}
