"""Settings of generation; defaults only here."""

from dataclasses import dataclass

from finerank.config import setting
from finerank.data.settings import TemplateSettings
from finerank.errors import ConfigError
from finerank.models.settings import ModelSettings


@dataclass(kw_only=True)
class SamplingSettings:
    """How the next token is chosen, and when an answer ends."""

    max_new_tokens: int = setting(128, help="longest answer in tokens")
    temperature: float = setting(0.7, help="flatter above 1, sharper below; 0 always takes the likeliest token")
    top_p: float = setting(0.95, help="choose among the likeliest tokens that together reach this probability")
    top_k: int = setting(50, help="choose among this many likeliest tokens; 0 for all")
    greedy: bool = setting(False, help="always take the likeliest token, the same as --temperature 0")
    stop: list[str] = setting([], split=False, help="texts that end the answer; they are not part of it")
    seed: int = setting(1234, help="seed of the choices; the same seed and prompt give the same answer")

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens must be at least 1, not {self.max_new_tokens}.")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature must be 0 or more, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p must be above 0 and at most 1, not {self.top_p}.")
        if self.top_k < 0:
            raise ConfigError(f"--top-k must be 0 (all tokens) or more, not {self.top_k}.")
        if "" in self.stop:
            raise ConfigError("--stop needs a text; an empty one would end every answer at once.")


@dataclass(kw_only=True)
class GeneratorSettings(ModelSettings, TemplateSettings, SamplingSettings):
    """A model, perhaps with an adapter, its prompt template, and how it answers; shared by generate and chat."""

    lora_load: str | None = setting(
        None, help="adapter or run folder to put on the base model", flags=("--lora-weights",)
    )
    base_precision: str = setting(
        "trained",
        choices=("trained", "original"),
        help="base under an adapter: as its run trained it (QLoRA: in 4 or 8 bits), or the original",
    )
    template_anyway: bool = setting(False, help="use a prompt template other than the one the adapter was trained with")
