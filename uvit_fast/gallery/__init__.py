"""A gallery in the browser.

`session` samples and knows nothing of a page, `source` is one checkpoint, `recipe` what makes a picture, `page` shows
them. Nothing but `page` needs Gradio.
"""
