"""A reference of the layout of published OSCAR and PISCO models, written from its description, for tests only.

It stands alone, so that a folder can hold it as remote code. Nothing in it is fast, or imports this project.
"""

from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

SYSTEM = (
    "You are a helpful assistant. Your task is to extract relevant information from provided documents and to answer "
    "to questions as briefly as possible."
)


class ReferenceConfig(PreTrainedConfig):
    """The settings of the published configuration."""

    model_type = "COCOM"

    decoder_model_name: str = ""
    doc_max_length: int = 128
    compr_rate: int = 16
    quantization: str = "no"
    sep: bool = True
    compr_model_name: str | None = None
    compr_n_layers: int | None = None
    compr_every_n_layer: int | None = None
    compr_base_model_name: str = ""
    compr_rms_norm: bool = False
    compr_mlp_hidden_dim: int = 8096
    compr_use_mlp: bool = False
    lora: bool = True
    lora_compressor: bool = False
    training_form: str = "both"
    lora_r: int = 16
    lora_r_compressor: int | None = None
    optimize_mem_tokens: bool = True
    different_mem_tokens: bool = True
    kbtc_training: bool = False
    load_adapters: bool = True
    attn_implementation: str = "eager"


def with_tokens(name: str, tokens: list[str], **settings):
    """A tokenizer with special tokens more, behind its own."""
    tokenizer = AutoTokenizer.from_pretrained(name, **settings)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.bos_token
    return tokenizer


class Adapter:
    """LoRA beside all linear layers of a model but its head; it counts while it is active."""

    def __init__(self, model: PreTrainedModel, rank: int):
        self.active, self.weights = True, {}
        head = model.get_output_embeddings()
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and layer is not head:
                first, second = torch.zeros(rank, layer.in_features), torch.zeros(layer.out_features, rank)
                self.weights[name] = (first, second)
                layer.register_forward_hook(lambda _, args, out, pair=(first, second): self.change(out, args[0], *pair))

    def change(self, output, inputs, first, second):
        # alpha is twice the rank
        return output + 2 * (inputs @ first.T @ second.T) if self.active else output

    def randomize(self):
        for pair in self.weights.values():
            for matrix in pair:
                matrix.normal_(std=0.1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {f"{name}.lora_{'AB'[i]}.weight": pair[i] for name, pair in self.weights.items() for i in (0, 1)}

    def load_state_dict(self, state: dict[str, torch.Tensor]):
        own = self.state_dict()
        assert own.keys() == state.keys()
        for name, matrix in own.items():
            matrix.copy_(state[name])


def load(auto_class, name: str, num_layers: int | None = None):
    config = AutoConfig.from_pretrained(name)
    if num_layers is not None:
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
    return auto_class.from_pretrained(name, config=config, dtype=torch.float32, attn_implementation="eager")


class Trimmed(torch.nn.Module):
    """The first layers of a language model, whose weights have a prefix."""

    def __init__(self, name: str, num_layers: int, keeps_norm: bool):
        super().__init__()
        self.custom_model = load(AutoModelForCausalLM, name, num_layers)
        if not keeps_norm:
            self.custom_model.model.norm = torch.nn.Identity()

    @property
    def whole(self):
        return self.custom_model

    def forward(self, **inputs):
        return self.custom_model.model(output_hidden_states=True, **inputs).hidden_states[-1]


class Separate(torch.nn.Module):
    """A model of its own."""

    def __init__(self, name: str):
        super().__init__()
        self.whole = load(AutoModel, name)

    def forward(self, **inputs):
        return self.whole(output_hidden_states=True, **inputs).hidden_states[-1]


class ReferenceModel(PreTrainedModel):
    """Compressor and decoder, in 32 bits."""

    config_class = ReferenceConfig

    def __init__(self, config: ReferenceConfig):
        super().__init__(config)
        self.num_slots = config.doc_max_length // config.compr_rate
        mem = [f"<MEM{i}>" for i in range(self.num_slots)]
        own = mem if config.different_mem_tokens else ["<MEM>"]
        more = ["<KBTC>"] if config.kbtc_training else []
        self.tokenizer = with_tokens(
            config.decoder_model_name, [*own, "<AE>", "<ENC>", "<SEP>", *more], padding_side="left"
        )
        self.slots = mem if config.different_mem_tokens else ["<MEM>"] * self.num_slots
        self.decoder = load(AutoModelForCausalLM, config.decoder_model_name)
        self.decoder.resize_token_embeddings(len(self.tokenizer))
        self.compressor, self.mlp = None, None
        if config.compr_model_name is not None:
            if config.compr_model_name == "mistral_trimmed":
                name = config.compr_base_model_name
                self.compressor = Trimmed(name, config.compr_n_layers, config.compr_rms_norm)
                self.reader = with_tokens(name, mem)
            else:
                self.compressor = Separate(config.compr_model_name)
                self.reader = with_tokens(config.compr_model_name, mem, padding_side="left")
            self.compressor.whole.resize_token_embeddings(len(self.reader))
            if config.compr_use_mlp:
                self.mlp = torch.nn.Sequential(
                    torch.nn.Linear(self.compressor.whole.config.hidden_size, config.compr_mlp_hidden_dim),
                    torch.nn.ReLU(),
                    torch.nn.Linear(config.compr_mlp_hidden_dim, self.decoder.config.hidden_size),
                )
        self.adapters, self.compressor_adapter = {}, None
        if config.lora:
            separately = config.training_form == "both_separately" and self.compressor is None
            names = ["decoder_adapter", *["encoder_adapter"] * separately]
            self.adapters = {name: Adapter(self.decoder, config.lora_r) for name in names}
        if config.lora_compressor and self.compressor is not None:
            self.compressor_adapter = Adapter(self.compressor.whole, config.lora_r_compressor or config.lora_r)

    @property
    def saved_compressor(self) -> torch.nn.Module | None:
        """The part of the compressor whose weights are saved: a trimmed one's have a prefix."""
        is_trimmed = isinstance(self.compressor, Trimmed)
        return self.compressor if self.compressor is None or is_trimmed else self.compressor.whole

    def activate(self, name: str):
        """Let an adapter count and no other; all of them where there is none of that name."""
        for other, adapter in self.adapters.items():
            adapter.active = name == other or name not in self.adapters

    @torch.no_grad()
    def randomize(self, scale: float = 0.05):
        """Weights as after some training: everything that is saved differs from the backbones."""
        for adapter in (*self.adapters.values(), self.compressor_adapter):
            if adapter is not None:
                adapter.randomize()
        trained = ("embed_tokens", "embeddings")
        for name, parameter in self.named_parameters():
            of_compressor = name.startswith("compressor.") and not self.config.lora_compressor
            if of_compressor or name.startswith("mlp.") or any(part in name for part in trained):
                parameter.add_(torch.randn_like(parameter) * scale)
        head, old = self.decoder.get_output_embeddings().weight, self.num_known_tokens
        if head is not self.decoder.get_input_embeddings().weight:
            head[old:] = head[:old].mean(dim=0)  # as transformers begins new rows, which nothing trains

    @property
    def num_known_tokens(self) -> int:
        return len(self.tokenizer) - (4 + (len(set(self.slots)) - 1) + self.config.kbtc_training)

    def save_layout(self, folder: Path, adapter_prefix: str = "", with_ends: bool = False):
        """Write the files of the published layout; adapters with copies of the embeddings, as some of PEFT's are."""
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        if not self.config.lora:
            parts = {"decoder": self.decoder, "compr.model": self.saved_compressor, "compr.mlp": self.mlp}
            tensors = {
                f"{prefix}.{name}": tensor
                for prefix, part in parts.items()
                if part is not None
                for name, tensor in part.state_dict().items()
            }
            torch.save(tensors, folder / "pytorch_model.bin")
            return
        ends = {n: p.data for n, p in self.decoder.named_parameters() if "lm_head" in n or "embed_tokens" in n}
        torch.save(ends, folder / "decoder_first_last_layers.pth")
        copies = ends if with_ends else {}
        states = {
            name: {adapter_prefix + key: value for key, value in {**adapter.state_dict(), **copies}.items()}
            for name, adapter in self.adapters.items()
        }
        torch.save(states, folder / "adapters.pth")
        if self.compressor is None:
            return
        inner = folder / "compressor"
        inner.mkdir(exist_ok=True)
        model = self.saved_compressor
        if self.mlp is not None:
            torch.save(self.mlp.state_dict(), inner / "mlp.pth")
        if self.config.lora_compressor:
            first = {n: p.data for n, p in model.named_parameters() if "embed_tokens.weight" in n}
            torch.save(first, inner / "first_layer.pth")
            torch.save(self.compressor_adapter.state_dict(), inner / "compressor_adapters.pth")
        else:
            torch.save(model.state_dict(), inner / "compressor.pth")

    @classmethod
    def from_pretrained(cls, name, *args, config=None, **kwargs):
        """Load what `save_layout` wrote, as remote code does."""
        folder = Path(name)
        config = ReferenceConfig.from_pretrained(folder) if config is None else config
        model = cls(config)
        read = {path.stem: torch.load(path, weights_only=True) for path in folder.rglob("*.pth")}
        model.decoder.load_state_dict(read["decoder_first_last_layers"], strict=False)
        for name, state in read["adapters"].items():
            model.adapters[name].load_state_dict(state)
        if "compressor" in read:
            model.saved_compressor.load_state_dict(read["compressor"])
        if "mlp" in read:
            model.mlp.load_state_dict(read["mlp"])
        return model.eval()

    # What the compressor reads.
    def rows(self, documents: list[str], questions: list[str] | None = None, max_length: int = 128):
        """Padded rows, memory tokens behind them."""
        config, reader = self.config, self.reader if self.compressor is not None else self.tokenizer
        settings = {"return_tensors": "pt", "padding": "max_length", "truncation": True}
        asked = [f"\nQuery:\n{q}Document:\n{d}" for q, d in zip(questions or documents, documents, strict=True)]
        if self.compressor is None:
            texts = documents if questions is None else asked
            texts = [f"<ENC>{reader.bos_token}{text}{reader.eos_token}" for text in texts]
            length = max_length + (3 if questions is None else 8)
            encoded = reader(texts, add_special_tokens=False, max_length=length, **settings)
        elif questions is None:
            encoded = reader(documents, max_length=max_length + 2, **settings)
        elif config.compr_model_name == "mistral_trimmed":
            encoded = reader(asked, max_length=max_length + 8, **settings)
        else:
            settings["truncation"] = "only_second"
            encoded = reader(questions, documents, max_length=max_length + 3, **settings)
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        names = self.slots if self.compressor is None else [f"<MEM{i}>" for i in range(self.num_slots)]
        mem = torch.tensor(reader.convert_tokens_to_ids(names)).expand(len(ids), -1)
        return torch.cat([ids, mem], dim=1), torch.cat([mask, torch.ones_like(mem)], dim=1)

    @torch.no_grad()
    def compress_documents(self, documents: list[str], questions: list[str] | None = None, max_length: int = 128):
        """Memory embeddings `(documents, slots, hidden)`."""
        ids, mask = self.rows(documents, questions, max_length)
        if self.compressor is not None:
            states = self.compressor(input_ids=ids, attention_mask=mask)[:, -self.num_slots :]
            return states if self.mlp is None else self.mlp(states)
        self.activate("encoder_adapter")
        outputs = self.decoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        return outputs.hidden_states[-1][:, -self.num_slots :]

    # What the decoder reads.
    def prompts(self, questions: list[str], num_documents: int):
        """Ids and mask of padded prompts, slots in them."""
        docs = ("".join(self.slots) + "<SEP>" * self.config.sep) * num_documents
        texts = []
        for question in questions:
            user = f"Background:\n{docs}\n\nQuestion:{question}"
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
            texts.append(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        encoded = self.tokenizer(texts, return_tensors="pt", padding="longest", add_special_tokens=False)
        return encoded["input_ids"], encoded["attention_mask"]

    def filled(self, ids: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Embeddings of prompts, with memory embeddings `(all documents, slots, hidden)` in their slots."""
        embeds = self.decoder.get_input_embeddings()(ids).clone()
        slot = self.tokenizer.convert_tokens_to_ids(self.slots[0])
        stride = self.num_slots + self.config.sep
        each = len(memory) // len(ids)
        for i, row in enumerate(ids):
            begin = row.tolist().index(slot)
            for j in range(each):
                place = begin + j * stride
                embeds[i, place : place + self.num_slots] = memory[i * each + j]
        return embeds

    @torch.no_grad()
    def logits(self, questions, documents, with_questions: bool, max_length: int = 128):
        """Logits at the last position of each prompt, of documents that are equally many for each question."""
        embeds, mask = self._read(questions, documents, with_questions, max_length)
        return self.decoder(inputs_embeds=embeds, attention_mask=mask).logits[:, -1]

    def _read(self, questions, documents, with_questions: bool, max_length: int):
        flat = [document for row in documents for document in row]
        asked = [question for question, row in zip(questions, documents, strict=True) for _ in row]
        memory = self.compress_documents(flat, asked if with_questions else None, max_length)
        ids, mask = self.prompts(questions, len(documents[0]))
        embeds = self.filled(ids, memory)
        self.activate("decoder_adapter")
        return embeds, mask

    @torch.no_grad()
    def generate_from_text(
        self, questions, documents, max_new_tokens: int = 128, with_questions=None, max_length: int = 128
    ):
        """Greedy answers."""
        if with_questions is None:
            with_questions = self.compressor is not None
        embeds, mask = self._read(questions, documents, with_questions, max_length)
        output = self.decoder.generate(
            inputs_embeds=embeds, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens
        )
        return self.tokenizer.batch_decode(output, skip_special_tokens=True)
