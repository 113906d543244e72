"""A gallery in the browser: `session` samples and knows nothing of a page, `recipe` is what makes a picture, `page` shows both.

Nothing but `page` needs Gradio.
"""
