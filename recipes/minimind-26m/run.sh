#!/usr/bin/env bash
cd "$(dirname "$0")/../.." && exec bash runs/recipe.sh recipes/minimind-26m "$@"
