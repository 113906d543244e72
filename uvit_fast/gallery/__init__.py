"""A gallery in the browser.

`session` samples without knowing of a page, `source` is one checkpoint, `recipe` is what makes a picture, `page` shows
them. Only `page` needs Gradio.
"""
