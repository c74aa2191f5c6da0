"""Studies with people: pages to hand out, and the scores of their answers.

Files here that register a class with `TASKS` add a task.
"""

from interp_models.userstudy.base import TASKS as TASKS
