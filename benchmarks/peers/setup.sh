#!/bin/sh
# Makes the environment of the peers that cannot share ours: setup.sh FOLDER [PYTHON]
# torchvision comes along in a build that does not match the CPU torch, and breaks the imports of transformers.
set -e
folder=${1:?usage: setup.sh FOLDER [PYTHON]}
here=$(cd "$(dirname "$0")" && pwd)
"${2:-python3}" -m venv --clear "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
"$folder/bin/python" -m pip uninstall --quiet -y torchvision
SPARSIFY_DISABLE_TRITON=1 "$folder/bin/python" -c 'import dictionary_learning, sparsify'
