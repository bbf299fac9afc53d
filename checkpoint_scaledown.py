# Copyright 2026 The ScaleDown authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Loading and saving: whole, as a delta over a generator of its own repository, and on the Hub, with a card."""

import contextlib
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import (
    CONFIG_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    logging,
)

try:
    from .backbones_scaledown import refuse_adapter
    from .card_scaledown import CARD_NAME, QUIETLY, is_rendered, read_card_fields, render_card
    from .configuration_scaledown import WEIGHTS_FORMATS
    from .embeddings_scaledown import compressor_embeddings_name, fill_embeddings, read_embeddings, shared_embeddings
    from .errors_scaledown import ScaleDownError
    from .gguf_scaledown import gguf_files, split_gguf
    from .lora_scaledown import check_lora, freeze, load_lora, refuse_other_lora
    from .processing_scaledown import PROCESSOR_FIELDS, check_source, is_lost_folder
    from .quantization_scaledown import bitsandbytes_config, is_quantized, share_quantizer, spare_compressor
    from .weights_scaledown import (
        HUB_ARGUMENTS,
        absolute_name,
        changed_weights,
        check_fingerprint,
        checkpoint_index,
        load_complete,
        pin_revision,
        remove_stale_weights,
        split_device_map,
        weight_samples,
    )
except ImportError:
    if __package__:  # loaded as remote code: the failure is real
        raise
    from backbones_scaledown import refuse_adapter
    from card_scaledown import CARD_NAME, QUIETLY, is_rendered, read_card_fields, render_card
    from configuration_scaledown import WEIGHTS_FORMATS
    from embeddings_scaledown import compressor_embeddings_name, fill_embeddings, read_embeddings, shared_embeddings
    from errors_scaledown import ScaleDownError
    from gguf_scaledown import gguf_files, split_gguf
    from lora_scaledown import check_lora, freeze, load_lora, refuse_other_lora
    from processing_scaledown import PROCESSOR_FIELDS, check_source, is_lost_folder
    from quantization_scaledown import bitsandbytes_config, is_quantized, share_quantizer, spare_compressor
    from weights_scaledown import (
        HUB_ARGUMENTS,
        absolute_name,
        changed_weights,
        check_fingerprint,
        checkpoint_index,
        load_complete,
        pin_revision,
        remove_stale_weights,
        split_device_map,
        weight_samples,
    )

logger = logging.get_logger(__name__)

MODEL_MODULE = "modeling_scaledown"
GENERATOR_ARGUMENTS = (
    "dtype",
    "torch_dtype",
    "device_map",
    "max_memory",
    "offload_folder",
    "offload_buffers",
    "attn_implementation",
)


class CheckpointMixin:
    """Loading and saving a `ScaleDownModel`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | None,
        *model_args,
        config: PreTrainedConfig | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        **kwargs,
    ):
        r"""
        Loads a model that was saved whole or as a delta; the call is the same.

        Args:
            pretrained_model_name_or_path (`str`): Hub name or folder.
            config (`ScaleDownConfig`, *optional*): In place of the saved one.
            load_in_4bit, load_in_8bit (`bool`, defaults to `False`):
                Quantize the generator with bitsandbytes; the compressor keeps its precision.
            model_args, kwargs:
                As in `PreTrainedModel.from_pretrained`. A `quantization_config` is applied to the generator alone.

        Returns:
            `ScaleDownModel` in evaluation mode, the generator frozen.

        Raises:
            ValueError: the generator's repository no longer holds the weights a delta was made for, the checkpoint does
                not hold the LoRA weights its configuration asks for, or a quantization cannot leave the compressor out.
            ImportError: quantization without bitsandbytes, or unmerged LoRA without peft.
        """
        _refuse_gguf(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        # The processor and the card are read when they are needed, from wherever that is.
        pretrained_model_name_or_path = absolute_name(pretrained_model_name_or_path)
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        given = kwargs if config is None else config.to_dict()
        overrides = {name: given[name] for name in PROCESSOR_FIELDS if name in given}
        kwargs.setdefault("use_safetensors", True)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["output_loading_info"] = True
        quantization = bitsandbytes_config(load_in_4bit, load_in_8bit, kwargs.get("dtype", kwargs.get("torch_dtype")))
        if quantization is not None:
            kwargs["quantization_config"] = quantization
        is_delta = False
        if pretrained_model_name_or_path is not None:
            hub = pin_revision(pretrained_model_name_or_path, hub)
            kwargs["revision"] = hub["revision"]
            refuse_adapter(pretrained_model_name_or_path, hub)
            is_delta = _is_delta(cls.config_class, pretrained_model_name_or_path, config, hub)
            if config is not None:
                overrides = _leave_out_saved(cls.config_class, overrides, pretrained_model_name_or_path, hub)
        later = _without_downloading_again(hub)
        if is_delta:
            model, info = cls._from_delta(pretrained_model_name_or_path, model_args, config, hub, kwargs)
        else:
            if kwargs.get("quantization_config") is not None:
                kwargs["quantization_config"] = spare_compressor(kwargs["quantization_config"])
            model, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
            if pretrained_model_name_or_path is not None and kwargs.get("variant") is None:
                check_lora(model, pretrained_model_name_or_path, later)
            model.remember_generator()
        model._hub_arguments, model._processor_overrides = later, overrides
        model._card_fields = None  # those of the card beside the weights
        share_quantizer(model)
        freeze(model)
        # transformers reads generation settings with all arguments, which would be saved and published among them.
        own = {*cls.config_class.__annotations__, "with_generator", "with_backbone"} - vars(GenerationConfig()).keys()
        for name in own & vars(model.generation_config).keys():
            delattr(model.generation_config, name)
        return (model, info) if wants_info else model

    @classmethod
    def _from_delta(cls, name_or_path, model_args, config, hub: dict, kwargs: dict):
        """Loads the compressor's side from here and the generator from its own repository."""
        if config is None:
            config, kwargs = cls.config_class.from_pretrained(name_or_path, return_unused_kwargs=True, **kwargs)
            kwargs = {**hub, **kwargs}
        shared = {key: hub[key] for key in ("cache_dir", "local_files_only", "token") if key in hub}
        if str(config.generator_name_or_path).endswith(".gguf"):  # where the caller says that it is now
            config.generator_name_or_path, config.generator_gguf_file = split_gguf(config.generator_name_or_path, None)
        source = {**shared, "revision": config.generator_revision, "gguf_file": config.generator_gguf_file}
        config.generator_name_or_path = absolute_name(config.generator_name_or_path)
        with_generator = kwargs.pop("with_generator", True)
        if with_generator:
            check_fingerprint(name_or_path, config, source)
        generator_kwargs = {key: kwargs[key] for key in GENERATOR_ARGUMENTS if kwargs.get(key) is not None}
        if isinstance(kwargs.get("device_map"), dict):
            generator_kwargs["device_map"], kwargs["device_map"] = split_device_map(kwargs["device_map"])
        generator_kwargs["quantization_config"] = kwargs.pop("quantization_config", None)
        # A generator that is quantized in its own repository says nothing about the compressor.
        quantized = config.generator_config.__dict__.pop("quantization_config", None)
        model, info = super().from_pretrained(name_or_path, *model_args, config=config, with_generator=False, **kwargs)
        if quantized is not None:
            model.config.generator_config.quantization_config = config.generator_config.quantization_config = quantized
        later = _without_downloading_again(hub)
        lacks_embeddings = _lacks_embeddings(model, name_or_path, later)
        if not with_generator:
            if lacks_embeddings:
                check_fingerprint(name_or_path, config, source)
                fill_embeddings(model, read_embeddings(model, source))
            return model, info
        generator_kwargs.setdefault("dtype", model.dtype)
        model.generator = load_complete(
            AutoModelForCausalLM,
            config.generator_name_or_path,
            config=model.config.generator_config,
            **generator_kwargs,
            **source,
        )
        model.remember_generator()
        if lacks_embeddings:
            values = model.generator.get_input_embeddings().weight
            fill_embeddings(model, read_embeddings(model, source) if values.is_meta else values)  # meta: offloaded
        if model.config.lora_config is not None:
            load_lora(model, name_or_path, later)
        model.generator.eval()
        # What a generator passes on to the whole model when it is there from the start.
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        return model, info

    def save_pretrained(
        self,
        save_directory: str,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        weights_format: str | None = None,
        **kwargs,
    ):
        r"""
        Saves weights, code, configuration, processor, tokenizers, generation settings and the rendered card.

        Args:
            save_directory (`str`): Folder to write; made when missing.
            is_main_process (`bool`, defaults to `True`): Whether this process writes what is not weights.
            state_dict (`dict`, *optional*): Weights gathered by a trainer.
            push_to_hub (`bool`, defaults to `False`): Also push, to `repo_id`.
            weights_format (`str`, *optional*):
                `"full"` or `"delta"` (without the generator's own weights); `config.weights_format` when left out.
            kwargs: As in `PreTrainedModel.save_pretrained` and `push_to_hub`.

        Raises:
            ValueError: a delta is asked for but the generator is not that of a known repository, there is no
                generator, or the processor lay in a folder that is gone.
        """
        hub_kwargs = {
            key: kwargs.pop(key)
            for key in ("repo_id", "private", "commit_message", "revision", "create_pr", "commit_description")
            if key in kwargs
        }
        if is_main_process:  # what else is saved beside the weights is found before any of it is written
            processor = self.processor if self._has_processor() else None
        previous = self.config.weights_format
        weights_format = weights_format or previous
        _check_weights_format(self, weights_format)
        if weights_format == "delta" and kwargs.get("variant") is not None:
            raise ScaleDownError(
                f'variant={kwargs["variant"]!r} goes with weights_format="full"; a delta has one set of weights. Leave '
                'variant out, or save with weights_format="full".'
            )
        if weights_format == "delta" and Path(self.config.generator_name_or_path).is_dir():
            logger.warning_once(
                f"This delta reads its generator from {self.config.generator_name_or_path}, a folder of this machine, "
                "and says so in its config.json. Elsewhere, load it with generator_name_or_path=where it is."
            )
        # Of a delta it was just checked.
        if weights_format == "full" and (_trainable_in_generator(self) or _changed_in_generator(self)):
            self.config.generator_fingerprint = None  # no longer the generator of its repository
        self.config.auto_map = {
            "AutoConfig": "configuration_scaledown.ScaleDownConfig",
            "AutoModel": f"{MODEL_MODULE}.ScaleDownModel",
            "AutoModelForCausalLM": f"{MODEL_MODULE}.ScaleDownModel",
            "AutoProcessor": "processing_scaledown.ScaleDownProcessor",
        }
        quantization = getattr(self.config, "quantization_config", None)
        if is_quantized(self.generator) or self.config.lora_config is not None:
            # transformers cannot undo how it read weights that were stored quantized, and undoes the names of experts
            # in those of LoRA too.
            kwargs.setdefault("save_original_format", False)
        self.config.weights_format = weights_format
        try:
            if weights_format == "delta":
                weights = self.state_dict() if state_dict is None else state_dict
                self._keys_to_ignore_on_save = {
                    name for name in weights if name.startswith("generator.") and "lora_" not in name
                }
                self._keys_to_ignore_on_save |= {shared_embeddings(self, weights)} - {None}
                self.config.__dict__.pop("quantization_config", None)  # what is saved is not quantized
            with _as_plain_class(self):
                super().save_pretrained(
                    save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs
                )
        finally:
            self.config.weights_format = previous
            self._keys_to_ignore_on_save = set()
            if quantization is not None:
                self.config.quantization_config = quantization
        if not is_main_process:
            return
        if kwargs.get("variant") is None:
            remove_stale_weights(Path(save_directory))
        if processor is not None:
            processor.save_pretrained(save_directory)
        else:
            logger.warning("The model has no processor, so none is saved beside it; assign model.processor first.")
        render_card(self, Path(save_directory), weights_format)
        if push_to_hub:
            hub_kwargs.setdefault("repo_id", Path(save_directory).name)
            self.push_to_hub(**hub_kwargs, weights_format=weights_format, state_dict=state_dict, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_description: str | None = None,
        token: str | bool | None = None,
        **save_kwargs,
    ) -> str:
        r"""
        Pushes the folder `save_pretrained` writes, card included; a card written by somebody stays.

        Args:
            repo_id (`str`): Repository to push to; made when missing.
            private (`bool`, *optional*): Whether a new repository is private.
            commit_message, revision, create_pr, commit_description, token: As in `huggingface_hub`.
            save_kwargs: Arguments of `save_pretrained`, such as `weights_format`.

        Returns:
            `str`: Address of the commit.

        Raises:
            ValueError: as in `save_pretrained`.
            LocalEntryNotFoundError: the Hub does not answer whether there is a card.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        self.card_fields = {**self.card_fields, "repo_id": repo_id, "revision": revision}
        try:
            keep_card = not is_rendered(Path(api.hf_hub_download(repo_id, CARD_NAME, revision=revision)))
        except LocalEntryNotFoundError:  # the Hub did not answer, which does not say that there is no card
            raise
        except EntryNotFoundError:
            keep_card = False
        # Those of another sharding; a variant lies beside the others.
        replaced = [SAFE_WEIGHTS_NAME, "model-*-of-*.safetensors", SAFE_WEIGHTS_INDEX_NAME]
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save_kwargs)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload ScaleDown model",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                ignore_patterns=CARD_NAME if keep_card else None,
                delete_patterns=replaced if save_kwargs.get("variant") is None else None,
            )
        return commit

    @property
    def card_fields(self) -> dict:
        """What the card says besides the configuration: those the weights' own card was rendered from, or assigned."""
        if self._card_fields is None:
            readme = self._find_beside_weights(CARD_NAME, **QUIETLY) if self.name_or_path else None
            self._card_fields = read_card_fields(readme) if readme is not None else {}
        return self._card_fields

    @card_fields.setter
    def card_fields(self, fields: dict):
        self._card_fields = fields

    def remember_generator(self):
        """Keeps a sum and a few values of every weight, so that a delta of a generator that was changed is noticed."""
        if self.generator is not None and self.config.generator_fingerprint is not None:
            self._generator_samples = weight_samples(self.generator)

    def _has_processor(self) -> bool:
        if self._processor is not None or not self.name_or_path:
            return self._processor is not None
        check_source(self.name_or_path)
        return self._find_beside_weights(PROCESSOR_NAME) is not None

    def _find_beside_weights(self, name: str, **kwargs) -> str | None:
        """File that was saved beside the weights this model was loaded from, if there is one, and if they are there."""
        if is_lost_folder(self.name_or_path):
            return None
        return cached_file(
            self.name_or_path, name, _raise_exceptions_for_missing_entries=False, **self._hub_arguments, **kwargs
        )


def _is_delta(config_class: type, name_or_path: str, config: PreTrainedConfig | None, hub: dict) -> bool:
    saved = config.to_dict() if config is not None else config_class.get_config_dict(name_or_path, **hub)[0]
    return saved.get("weights_format") == "delta"


def _lacks_embeddings(model: PreTrainedModel, name_or_path: str, hub: dict) -> bool:
    """Whether a delta leaves it to the generator which token embeddings its compressor has."""
    if model.compressor.backbone is None or model.config.compressor_type != "n_layers":
        return False
    return compressor_embeddings_name(model) not in checkpoint_index(name_or_path, **hub)


def _leave_out_saved(config_class: type, settings: dict, name_or_path: str, hub: dict) -> dict:
    """Settings of a configuration that differ from the saved one, which the Auto classes hand over unasked."""
    file = cached_file(name_or_path, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if file is None:
        return settings
    saved = config_class.from_json_file(file)
    return {name: value for name, value in settings.items() if value != getattr(saved, name)}


def _check_weights_format(model: PreTrainedModel, weights_format: str):
    if weights_format not in WEIGHTS_FORMATS:
        raise ScaleDownError(f"weights_format={weights_format!r} is unknown; choose {' or '.join(WEIGHTS_FORMATS)}.")
    if model.generator is None or model.compressor.backbone is None:
        part = "generator" if model.generator is None else "compressor's backbone"
        raise ScaleDownError(f"This model was loaded without its {part}, so it cannot be saved; load it whole.")
    refuse_other_lora(model)
    quantizer = getattr(model.generator, "hf_quantizer", None)
    if weights_format == "full":
        if quantizer is not None and not isinstance(quantizer.quantization_config, BitsAndBytesConfig):
            raise ScaleDownError(
                "The generator is quantized in a way that is not saved with a model. If its own repository is, "
                'save with weights_format="delta"; if it was quantized while loading, save the model without that.'
            )
        return
    if not model.config.generator_name_or_path or not model.config.generator_fingerprint:
        raise ScaleDownError(
            'weights_format="delta" needs a generator that is still the one of its repository: build the model '
            "with from_backbones and do not merge LoRA (train.py --merge_lora false or --weights_format delta), or "
            'save with weights_format="full".'
        )
    trainable = _trainable_in_generator(model)
    if trainable:
        raise ScaleDownError(
            f'weights_format="delta" leaves out the generator\'s own weights, but {len(trainable)} of them are '
            f'trainable ({trainable[0]}, …). Save with weights_format="full".'
        )
    changed = _changed_in_generator(model)
    if changed:
        raise ScaleDownError(
            f'weights_format="delta" leaves out the generator\'s own weights, but {len(changed)} of them are not '
            f"those of {model.config.generator_name_or_path!r} any more ({changed[0]}, …). Save with "
            'weights_format="full".'
        )


def _trainable_in_generator(model: PreTrainedModel) -> list[str]:
    """Names of the generator's own weights that training may have changed."""
    return [n for n, p in model.generator.named_parameters() if p.requires_grad and "lora_" not in n]


def _changed_in_generator(model: PreTrainedModel) -> list[str]:
    if model._generator_samples is None:
        return []
    return changed_weights(model._generator_samples, model.generator)


@contextlib.contextmanager
def _as_plain_class(model: PreTrainedModel):
    """Gives a model the class whose code lies beside its weights: FSDP has one of its own, and so may users."""
    wrapped = type(model)
    # transformers saves the file of the class, which remote code has in a module of its own.
    plain = next(c for c in wrapped.__mro__ if c.__module__.rpartition(".")[2] == MODEL_MODULE)
    if wrapped is not plain and not wrapped.__module__.startswith("torch."):
        logger.warning_once(
            f"Saved as a {plain.__name__}, which is what it loads as: the code of {wrapped.__name__} stays out."
        )
    model.__class__ = plain
    try:
        yield
    finally:
        model.__class__ = wrapped


def _refuse_gguf(name_or_path: str | None, subfolder: str):
    """A GGUF file holds a language model, and no ScaleDown model."""
    if name_or_path is None:
        return
    folder = Path(name_or_path) / subfolder
    found = [] if (folder / CONFIG_NAME).is_file() else gguf_files(folder)
    if str(name_or_path).endswith(".gguf") or found:
        file = str(folder / found[0]) if found else str(name_or_path)
        raise ScaleDownError(
            f"{file} is a language model in GGUF, not a ScaleDown model. To build one on top of it: "
            f"ScaleDownModel.from_backbones({file!r}); to train it: train.py --generator_name_or_path {file}."
        )


def _without_downloading_again(hub: dict) -> dict:
    """Where to read from once everything was downloaded anew, if that was asked for."""
    return {name: value for name, value in hub.items() if name != "force_download"}
