"""How far a run is and what it says: lines, bars, numbers. It does not know what is being done."""
