"""What binding a checkpoint to a model finds, and what both formats share in finding it."""

from ktransformers.errors import is_whole
from ktransformers.loaders.sources import Source

Shapes = dict[str, tuple[int, ...]]


class Binding:
    """What binding finds: sources by module name, and what to say about everything else."""

    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}
        self.absent: dict[str, str] = {}  # why a module's tensor could not be made
        self.harmless: set[str] = set()  # checkpoint names that are neither used nor a problem
        self.ignored: list[str] = []  # regular expressions of such names
        self.transposed: set[str] = set()  # expert weights that the model holds as [E, K, N]
        self.experts: dict[str, int] = {}  # expert weights of more experts than are computed -> how many are
        self.interleaved: set[str] = set()  # those whose rows are gate and up in turn
        self.notes: list[str] = []  # problems with no tensor of their own


def extra_layers(config, stated: object = None) -> range:
    """Layers after the model's own: multi-token prediction, which transformers does not build. `stated`: how many a
    file says it has."""
    config = config.get_text_config()
    layers, known = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", 0) or 0
    more = min(stated, 1000) if is_whole(stated) else 0
    return range(layers, layers + max(known, more))
