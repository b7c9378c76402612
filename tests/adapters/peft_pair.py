"""One adapter in finerank and in the real PEFT: the same outputs, the same gradients, the same files."""

import peft
import torch
from safetensors.torch import load_file

from finerank.adapters.files import load_adapter, save_adapter
from finerank.adapters.inject import inject_adapters
from finerank.adapters.settings import AdapterSettings
from finerank.models.forward import loss_sum
from tiny import tiny_model

IDS = torch.arange(3, 27).view(2, 12)
LABELS = torch.where(torch.arange(12) < 3, -100, IDS.roll(-1, 1))


def grown(model, *, token_ids=(), **settings):
    """Our adapters, all changing something."""
    values = {"lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "down_proj"], **settings}
    adapters = inject_adapters(model, AdapterSettings(**values), seed=1, token_ids=token_ids)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g).to(p))
    return adapters


def our_gradients(model, adapters):
    """Gradients by name in the adapter file, through finerank's own loss."""
    model.train()
    positions = torch.arange(12).expand(2, 12)
    loss = loss_sum(model, IDS, LABELS, positions, attention_mask=torch.ones_like(IDS))
    grads = torch.autograd.grad(loss, adapters.parameters())
    names = [name.removeprefix("base_model.model.") for name, _ in adapters.named_parameters()]
    model.eval()
    return loss.item(), dict(zip(names, grads, strict=True))


def their_gradients(model):
    """The same through PEFT and full logits, under the names of its file."""
    model.train()
    logits = model(IDS).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), LABELS.flatten(), reduction="sum")
    loss.backward()
    model.eval()
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            short = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            found[short.replace(".default", "")] = p.grad
    return loss.item(), found


def in_peft(model, folder):
    """The adapter of a folder, trainable, in PEFT."""
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=True).eval()


def by_peft(folder, family, **config):
    """An adapter made and written by PEFT; its model."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **config}
    model = peft.get_peft_model(tiny_model(family), peft.LoraConfig(**values))
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=g))
    model.save_pretrained(folder)
    return model.eval()


def check_pair(folder, family, *, make=tiny_model, same_names=True, **settings):
    """Ours against PEFT that read our file: logits, loss, gradients, and the names in the file that PEFT writes."""
    model = make(family)
    adapters = grown(model, **settings)
    with torch.no_grad():
        ours = model(IDS).logits
    save_adapter(adapters, folder, base_model_name="tiny")
    theirs = in_peft(make(family), folder)
    with torch.no_grad():
        wanted = theirs(IDS).logits
    assert (ours - wanted).abs().max() < 1e-5
    our_loss, our_grads = our_gradients(model, adapters)
    their_loss, their_grads = their_gradients(theirs)
    assert abs(our_loss / their_loss - 1) < 1e-6
    if same_names:
        assert set(our_grads) == set(their_grads)
        for name, grad in our_grads.items():
            torch.testing.assert_close(grad, their_grads[name], rtol=1e-4, atol=2e-5, msg=name)
    theirs.save_pretrained(folder / "again", save_embedding_layers=False)
    assert set(load_file(folder / "adapter_model.safetensors")) == set(
        load_file(folder / "again" / "adapter_model.safetensors")
    )
    return model, adapters, our_grads, their_grads


def check_reading(folder, family, **config):
    """What PEFT wrote gives the same logits here, and comes back bit-equal from our file."""
    theirs = by_peft(folder, family, **config)
    model = tiny_model(family)
    adapters = load_adapter(model, folder)
    with torch.no_grad():
        assert (model(IDS).logits - theirs(IDS).logits).abs().max() < 1e-5
        assert (model(IDS).logits - tiny_model(family)(IDS).logits).abs().max() > 1e-2
    save_adapter(adapters, folder / "ours", base_model_name="tiny")
    before, after = (load_file(f / "adapter_model.safetensors") for f in (folder, folder / "ours"))
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert set(before) - set(after) <= {name for name in before if name.endswith("base_layer.weight")}
    return model, adapters, theirs
