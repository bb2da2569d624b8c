"""Steps of the loop as `simnpo unlearn` takes them, for the tests that hold a prediction to what they really took."""

from accelerate import Accelerator

from simnpo.attention import use_packed_attention
from simnpo.batch import Sampler
from simnpo.config import UnlearnConfig
from simnpo.data import Example
from simnpo.planning.ledger import LiveBytes
from simnpo.training import setup
from simnpo.training.forward import Collator
from simnpo.training.optimizer import clip_gradients, make_optimizer
from simnpo.training.step import accumulate


def examples(name: str, lengths: list[int], vocab_size: int) -> list[Example]:
    """Made-up tokens, all but the first of each a target."""
    rows = []
    for i, length in enumerate(lengths):
        ids = [(7 * i + 3 * n) % vocab_size for n in range(length)]
        rows.append(Example(f"{name}:{i}", "", "", ids, list(ids)))
    return rows


def measured_peak(config: UnlearnConfig, forget: list[Example], retain: list[Example], *, packed: bool) -> int:
    """Bytes of tensors alive at the worst moment of two steps of all examples, by counting storages."""
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    model = setup.build_model(config, accelerator.device)
    if packed and config.attention is None:
        use_packed_attention(model.eval())
    collator = Collator(packed, 0, accelerator.device, ref_logps=None)
    parameters = [p for p in model.parameters() if p.requires_grad]
    sampler = Sampler(forget, retain, len(forget), len(retain), config.seed)
    model.train()
    with LiveBytes() as counter:
        for tensor in (*model.parameters(), *model.buffers()):
            counter.adopt(tensor)
        optimizer = make_optimizer(
            parameters, config.weight_decay, name=config.optimizer, gradient_release=config.gradient_release
        )
        # the second step finds the states that the first has made
        for step in range(2):
            accumulate(accelerator, model, collator, sampler, config, step)
            clip_gradients(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return counter.peak
