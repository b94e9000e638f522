"""The modelled figures of FoMoE's paper and the sweep over sites, by this project's formulas. No run needs them."""
