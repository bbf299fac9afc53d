"""Look at compression in a browser: one question answered from whole passages and from slots, side by side.

    python app.py                                      # the embedded model, at http://127.0.0.1:7860
    python app.py --model your-name/your-scaledown     # another model: a folder, or a name on the Hub

`python app.py --help` lists every option; the page itself is in scaledown/app/.
"""

import sys

if __name__ == "__main__":
    from scaledown.commands import app

    sys.exit(app())
