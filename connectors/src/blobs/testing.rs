//! The rules of [`Blobs`], for the tests of every store.

use bytes::Bytes;

use super::{BLOB_LEN_MAX, Blob, Blobs};

/// Bytes by a seed.
pub(crate) fn bytes(len: usize, seed: u64) -> Bytes {
    let mut bytes = vec![0; len];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes.into()
}

/// What every store does, on an empty one, which is empty again afterwards.
pub(crate) async fn conforms(blobs: &dyn Blobs) {
    let names = async |prefix: &str| -> Vec<String> {
        let listed: Vec<Blob> = blobs.list(prefix).await.unwrap();
        listed.into_iter().map(|blob| blob.name).collect()
    };
    assert!(!blobs.shown().is_empty());
    // A store that others share may hold what is not ours.
    let before = names("a").await;
    assert_eq!(before, [""; 0]);
    assert_eq!(blobs.get("a/b").await.unwrap(), None);
    blobs.delete("a/b").await.unwrap();

    // Of all sizes, also none and above a message of the transport.
    let sizes = [("a/b", 0), ("a/bc", 1), ("a/b.d/e", 700_000), ("a/b.d/f", 5 << 20), ("a-b", 3)];
    for (name, len) in sizes {
        blobs.put(name, bytes(len, 1)).await.unwrap();
        assert_eq!(blobs.get(name).await.unwrap().map(|b| b.len()), Some(len), "{name}");
        assert!(blobs.get(name).await.unwrap() == Some(bytes(len, 1)), "{name}");
    }
    assert_eq!(names("a").await, ["a-b", "a/b", "a/b.d/e", "a/b.d/f", "a/bc"]);
    assert_eq!(names("a/").await, ["a/b", "a/b.d/e", "a/b.d/f", "a/bc"]);
    assert_eq!(names("a/b.").await, ["a/b.d/e", "a/b.d/f"]);
    assert_eq!(names("a/b.d/f").await, ["a/b.d/f"]);
    assert_eq!(names("a/x/y").await, [""; 0]);
    let listed = blobs.list("a/b.d/").await.unwrap();
    assert_eq!(listed[0], Blob { name: "a/b.d/e".to_owned(), bytes: 700_000 });

    // Again the same, and another content as a whole.
    blobs.put("a/b.d/e", bytes(700_000, 1)).await.unwrap();
    blobs.put("a/b.d/f", bytes(2_000_000, 2)).await.unwrap();
    assert!(blobs.get("a/b.d/f").await.unwrap() == Some(bytes(2_000_000, 2)));
    assert_eq!(names("a/b.d/").await, ["a/b.d/e", "a/b.d/f"]);

    // What leads elsewhere or is too large.
    for name in ["", "/a", "a/", "..", "a/../b", "a b", ".a", "a/*"] {
        assert!(blobs.put(name, Bytes::new()).await.is_err(), "{name:?}");
        assert!(blobs.get(name).await.is_err(), "{name:?}");
        assert!(blobs.delete(name).await.is_err(), "{name:?}");
    }
    let large = Bytes::from(vec![0; BLOB_LEN_MAX + 1]);
    assert!(blobs.put("a/large", large).await.is_err());

    for (name, _) in sizes {
        blobs.delete(name).await.unwrap();
        blobs.delete(name).await.unwrap();
        assert_eq!(blobs.get(name).await.unwrap(), None, "{name}");
    }
    assert_eq!(names("a").await, [""; 0]);
}
