//! Golden files: `tests/golden/NAME` holds what must come out; `UPDATE_GOLDEN=1` rewrites it, and
//! the difference is then for the reviewer.

use std::path::Path;

/// Compares with a golden file.
pub fn check(name: &str, found: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, found).unwrap();
        return;
    }
    let expected = super::read(&path);
    if found == expected {
        return;
    }
    let differs = found.lines().zip(expected.lines()).position(|(a, b)| a != b);
    let at = differs.unwrap_or_else(|| found.lines().count().min(expected.lines().count()));
    panic!(
        "{name} differs from line {}:\n   found {:?}\nexpected {:?}\nUPDATE_GOLDEN=1 rewrites it",
        at + 1,
        found.lines().nth(at),
        expected.lines().nth(at)
    );
}
