"""Everything for readers: reports as tables, Markdown, HTML and plots, the model card, and `streamline.json`."""

__all__ = [
    "files",
    "html",
    "interaction_wording",
    "model_card",
    "notebook",
    "numbers",
    "plots",
    "record",
    "text_forms",
    "wording",
]
