"""How byte-level BPE splits text into words, by llama.cpp's name in `tokenizer.ggml.pre`.

Patterns are those of each model's tokenizer.json where that is known, else of llama.cpp, src/llama-vocab.cpp. llama.cpp does not
normalise text; `nfc` says where the model's own tokenizer does.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from metalstep.checkpoint.errors import CheckpointError

ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CL100K = ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
QWEN2 = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = ENGLISH + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
O200K = _WORD.replace("%s", ENGLISH + "?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES
TEKKEN = _WORD.replace("%s", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|""" + SPACES,
)
_CJK = "[一-龥\u0800-一가-\ud7ff]+"
# Letters that have a case, as ranges: one Unicode version for all time.
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼ"
    "ℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)


@dataclass(frozen=True)
class PreTokenizer:
    """splits: patterns, each of which splits what those before it left. gpt2: GPT-2's own pattern is the last of them.

    single_digits: digits are words of their own, before anything else. add_bos: the default where the metadata does not say.
    ignore_merges: a whole word in the vocabulary is one token. nfc: text is composed first.
    """

    splits: tuple[str, ...] = ()
    gpt2: bool = False
    single_digits: bool = False
    add_bos: bool = False
    ignore_merges: bool = False
    nfc: bool = False


_GPT2 = PreTokenizer(gpt2=True)
_GPT2_NFC = PreTokenizer(gpt2=True, nfc=True)
_DIGITS = PreTokenizer(gpt2=True, single_digits=True)
_LLAMA3 = PreTokenizer((CL100K,), add_bos=True, ignore_merges=True)
_QWEN2 = PreTokenizer((QWEN2,), nfc=True)
_O200K = PreTokenizer((O200K,))
_DEEPSEEK_V3 = PreTokenizer(DEEPSEEK_V3)
_BAILING = PreTokenizer((r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    # What llama.cpp does for a file that names none.
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "jais", "trillion", "granite-docling", "exaone4"), _GPT2),
    **dict.fromkeys(("olmo", "mpt"), _GPT2_NFC),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"), _DIGITS),
    "command-r": PreTokenizer(gpt2=True, single_digits=True, nfc=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), PreTokenizer((CL100K,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "stablelm2", "hunyuan"), _QWEN2),
    **dict.fromkeys(("solar-open", "grok-2"), PreTokenizer((QWEN2,))),
    "qwen35": PreTokenizer((QWEN35,), nfc=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _O200K),
    "tekken": PreTokenizer((TEKKEN,), add_bos=True, ignore_merges=True),
    "deepseek-llm": PreTokenizer(("[\r\n]", rf"\s?[{_CASED}]+", r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", _CJK, r"\p{N}+")),
    "deepseek-coder": PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK_V3),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _BAILING),
    "seed-coder": PreTokenizer((ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + SPACES,)),
}


def pre_tokenizer(path: Path, name: str) -> PreTokenizer:
    """Raises: CheckpointError for a name that is not known."""
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{path}: the pre-tokenizer (tokenizer.ggml.pre) is {name!r}, expected one of {', '.join(PRE_TOKENIZERS)}; "
            "use an mlx-lm directory of this model"
        )
    return PRE_TOKENIZERS[name]
