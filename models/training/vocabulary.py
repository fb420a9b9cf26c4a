"""The embedded model's tokenizer: a byte-level BPE learnt from the corpus, with a chat template."""

from corpus import Writer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1536
CONTEXT = 1024  # tokens of a whole conversation
BEGIN, END, USER, ASSISTANT, SYSTEM, PAD = SPECIAL = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>")

# Words keep their leading space; a digit is always a token of its own, so numbers never seen still read well.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(seed: int, conversations: int = 6000) -> PreTrainedTokenizerFast:
    """Learns the merges from `conversations` of the training stream."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=list(SPECIAL), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(_texts(seed, conversations), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BEGIN, eos_token=END, pad_token=PAD,
                                   additional_special_tokens=[USER, ASSISTANT, SYSTEM], chat_template=TEMPLATE,
                                   model_max_length=CONTEXT, clean_up_tokenization_spaces=False)


def _texts(seed: int, conversations: int):
    writer = Writer(seed)
    for _ in range(conversations):
        for message in writer.conversation():
            yield message["content"]
