from dataclasses import dataclass


@dataclass
class Tally:
    """Counts faulty ones among all, and says when to report them: at the first, the tenth, the hundredth, …"""

    faulty: int = 0
    total: int = 0

    def add(self, faulty: int, total: int) -> bool:
        """Adds `faulty` of `total`. Returns whether the count of faulty ones has got another digit."""
        digits = self._digits()
        self.faulty, self.total = self.faulty + faulty, self.total + total
        return self._digits() > digits

    def _digits(self) -> int:
        return len(str(self.faulty)) if self.faulty else 0
