//! The C library's allocator: large buffers are given back to the kernel as soon as they are freed.

/// Size from which a buffer has pages of its own, in bytes: the allocator's own first value. By itself it raises the
/// value to the largest buffer that was ever freed, up to 32 MiB, and from then on keeps such buffers in each of its
/// arenas. A daemon beside hostile clients then kept 350 MiB instead of 95 MiB.
const MMAP_THRESHOLD_BYTES: i32 = 128 << 10;

/// Keeps the allocator from raising its threshold. Returns `false` if it refuses.
#[expect(unsafe_code, reason = "no library sets parameters of the allocator")]
pub(crate) fn return_large_buffers() -> bool {
    // SAFETY: the call changes a number of the allocator and may be made at any time.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES) == 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_buffers_have_pages_of_their_own_whatever_was_freed_before() {
        assert!(return_large_buffers());
        for mebibytes in [30, 16, 8, 4, 2, 1] {
            let buffer = vec![1u8; mebibytes << 20];
            // The allocator's own header is all that precedes such a buffer in its first page.
            assert_eq!(buffer.as_ptr().addr() % 4096, 16, "{mebibytes} MiB");
        }
    }
}
