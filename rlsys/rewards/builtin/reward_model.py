"""A sequence-classification model as reward: one copy, in a process of its own."""

from __future__ import annotations

import asyncio
from typing import Any

from rlsys.rewards.base import AsyncORM, register_reward
from rlsys.types import Message


@register_reward("reward_model")
class RewardModel(AsyncORM):
    """The logit that a sequence-classification model gives to the whole conversation.

    Any model of transformers' AutoModelForSequenceClassification with one output; its own chat
    template renders the conversation. The waiting completions of all groups go through it in
    batches. Each model has a process of its own, however many reward workers there are.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 8,
        max_length: int | None = None,
        dtype: str = "auto",
        device: str | None = None,
    ):
        """Load the model.

        Args:
            path: folder or hub id of the model.
            batch_size: conversations a forward pass.
            max_length: the last tokens of a conversation that count; None is all that the model
                has positions for.
            dtype: torch's name of the weights' type, such as "bfloat16"; "auto" is the model's.
            device: torch's name; None is the GPU if the process has one, else the CPU.

        Raises:
            ValueError: a setting out of range, a missing folder, a model with several outputs, or
                a tokenizer without chat template.
        """
        import torch  # not before a reward model is wanted
        import transformers

        from rlsys.model.chat_template import ChatTemplate
        from rlsys.model.folder import resolve_model_path

        super().__init__()
        if batch_size < 1 or (max_length is not None and max_length < 1):
            raise ValueError(
                f"reward_model: batch_size and max_length must be at least 1, not {batch_size} "
                f"and {max_length}"
            )
        folder = resolve_model_path(path)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
        self._template = ChatTemplate(self._tokenizer)
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config.num_labels != 1:
            raise ValueError(
                f"reward_model: {path!r} has {config.num_labels} outputs; a reward model has one "
                "(num_labels: 1 in its config.json)"
            )
        model = _load(path, folder, dtype)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = model.to(device).eval()
        pad = self._tokenizer.pad_token_id
        self._pad: int = self._tokenizer.eos_token_id if pad is None else pad
        # The model finds each row's last token by it.
        self._model.config.pad_token_id = self._pad
        self._max_length = max_length or getattr(config, "max_position_embeddings", None)
        self.batch_size = batch_size
        self._waiting: list[tuple[list[int], asyncio.Future[float]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def __call__(
        self,
        completions: list[str],
        messages: list[list[Message]],
        tools: list[Any] | None = None,
        **columns: Any,
    ) -> list[float]:
        """[G] the model's logit for each conversation: tools, prompt and completion.

        Raises:
            ValueError: the model's chat template refuses one.
        """
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[float]] = []
        for conversation, given in zip(messages, tools or [None] * len(messages), strict=True):
            futures.append(loop.create_future())
            self._waiting.append((self._encode(conversation, given), futures[-1]))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return list(await asyncio.gather(*futures))

    def _encode(self, conversation: list[Message], tools: Any) -> list[int]:
        token_ids = self._template.answered_tokens(conversation, tools)
        return token_ids[-self._max_length :] if self._max_length else token_ids

    async def _work(self) -> None:
        """Score batches until none is waiting."""
        while self._waiting:
            # Drop those whose time was over before their turn.
            self._waiting = [entry for entry in self._waiting if not entry[1].done()]
            batch = self._waiting[: self.batch_size]
            del self._waiting[: self.batch_size]
            if not batch:
                return
            try:
                # In a thread, so that groups that come meanwhile join the next batch.
                scores = await asyncio.to_thread(self._logits, [ids for ids, _ in batch])
            except Exception as error:  # raised by the calls that wait for this batch
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), score in zip(batch, scores, strict=True):
                if not future.done():
                    future.set_result(score)

    def _logits(self, rows: list[list[int]]) -> list[float]:
        """[N] one forward pass over right-padded rows."""
        import torch

        longest = max(map(len, rows))
        input_ids = torch.full((len(rows), longest), self._pad)
        mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        device = self._model.device
        with torch.inference_mode():
            output = self._model(input_ids=input_ids.to(device), attention_mask=mask.to(device))
        return output.logits[:, 0].float().cpu().tolist()


def _load(path: str, folder: Any, dtype: str) -> Any:
    """The model of a folder or hub id; `path` is its name in errors."""
    import transformers

    try:
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except OSError as error:
        raise ValueError(
            f"reward_model: {path!r} has no safetensors files that transformers can read, and "
            "other files may run code when they are loaded: save it again with transformers "
            f"({str(error).splitlines()[0]})"
        ) from None
