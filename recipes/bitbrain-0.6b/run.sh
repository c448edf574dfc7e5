#!/usr/bin/env bash
cd "$(dirname "$0")/../.." && exec bash runs/recipe.sh recipes/bitbrain-0.6b "$@"
