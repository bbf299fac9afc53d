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
"""The error of ScaleDown."""


class ScaleDownError(ValueError):
    """What a user can mend: the message says what was found, what was expected, and what to do."""


WITHOUT_GENERATOR = (
    "This model was loaded without its generator; it can compress and rank, not answer or have LoRA layers. Load it "
    "with the generator for that."
)

__all__ = ["WITHOUT_GENERATOR", "ScaleDownError"]
