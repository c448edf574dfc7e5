#!/usr/bin/env bash
cd "$(dirname "$0")/../.." && exec bash runs/recipe.sh recipes/minimind-3-moe-198m "$@"
