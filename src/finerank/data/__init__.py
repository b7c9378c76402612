"""From files of rows to batches of token ids: readers, handlers, templates, tokenising, packing, indexed files."""
