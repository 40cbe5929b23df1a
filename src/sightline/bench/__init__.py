"""Speed, memory and scaling, measured: mixers beside dense attention, neighborhood attention's bounds, backbones."""
