"""The core: encode, select, lay out, pack, report. It knows no host."""
