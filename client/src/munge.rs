#![allow(
    unsafe_code,
    reason = "libmunge is a C library, and it is loaded at run time so that the programs start without it"
)]
//! Who asks, as munge says it: five functions of libmunge, checked by hand against munge.h of 0.5.15.
//!
//! The library (libmunge.so.2, an ABI unchanged since 0.5) is opened with dlopen when the first credential is made,
//! so `berth` and `berth-runtime` start on machines without it. It is thread-safe as long as no context is shared:
//! each call makes one of its own. Its waits for munged are bounded (a few seconds).

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::transmute;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

use berth_image::Digest;

/// Longest payload taken from a credential, in bytes. Ours have 64.
const MAX_PAYLOAD: usize = 4096;
/// `MUNGE_OPT_SOCKET` of munge.h.
const OPT_SOCKET: c_int = 8;
const LIBRARY: &CStr = c"libmunge.so.2";

/// Why there is no credential, or a credential is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MungeError {
    #[error("libmunge cannot be loaded: {0}")]
    Library(String),
    #[error("munge: {0}")]
    Call(String),
    #[error("the socket's path holds a NUL byte")]
    Socket,
    #[error("the credential is not one of munge's")]
    Malformed,
    #[error("the credential holds {0} bytes, more than {MAX_PAYLOAD}")]
    Payload(usize),
}

/// What a good credential says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credential {
    pub payload: Vec<u8>,
    pub uid: u32,
    pub gid: u32,
}

/// What the credential of a request covers: the lowercase hex SHA-256 of
/// `METHOD\nPATH[?QUERY]\nhex(sha256(body))\n`.
pub fn request_payload(method: &str, path_and_query: &str, body: &[u8]) -> String {
    let text = format!("{method}\n{path_and_query}\n{}\n", Digest::of(body).hex());
    Digest::of(text.as_bytes()).hex()
}

type Context = *mut c_void;

type Encode = unsafe extern "C" fn(*mut *mut c_char, Context, *const c_void, c_int) -> c_int;
type Decode = unsafe extern "C" fn(
    *const c_char,
    Context,
    *mut *mut c_void,
    *mut c_int,
    *mut libc::uid_t,
    *mut libc::gid_t,
) -> c_int;
type StrError = unsafe extern "C" fn(c_int) -> *const c_char;
type Create = unsafe extern "C" fn() -> Context;
type Destroy = unsafe extern "C" fn(Context);
type Set = unsafe extern "C" fn(Context, c_int, ...) -> c_int;
type ContextError = unsafe extern "C" fn(Context) -> *const c_char;

/// libmunge, loaded. May be shared between threads.
#[derive(Debug, Clone)]
pub struct Munge {
    encode: Encode,
    decode: Decode,
    strerror: StrError,
    create: Create,
    destroy: Destroy,
    set: Set,
    context_error: ContextError,
    /// munged's socket where it is not the library's default.
    socket: Option<CString>,
}

impl Munge {
    /// Loads the library. `socket` is munged's, where it is not the library's default.
    ///
    /// # Errors
    /// [`MungeError::Library`] where libmunge is not installed.
    pub fn load(socket: Option<&Path>) -> Result<Self, MungeError> {
        let socket = socket
            .map(|s| CString::new(s.as_os_str().as_bytes()))
            .transpose()
            .map_err(|_| MungeError::Socket)?;
        // SAFETY: a NUL-terminated name; RTLD_NOW so that a broken library fails here. Never closed.
        let library = unsafe { libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if library.is_null() {
            return Err(MungeError::Library(loader_error()));
        }
        let symbol = |name: &CStr| {
            // SAFETY: `library` is a handle that is never closed, `name` ends with NUL.
            let address = unsafe { libc::dlsym(library, name.as_ptr()) };
            if address.is_null() {
                return Err(MungeError::Library(format!(
                    "it has no {}",
                    name.to_string_lossy()
                )));
            }
            Ok(address)
        };
        // SAFETY: each symbol is the function of that name in munge.h, whose prototype (read there) is the field's
        // type: enums are ints, uid_t and gid_t are libc's, munge_ctx_t is a pointer to an opaque struct.
        unsafe {
            Ok(Self {
                encode: transmute::<*mut c_void, Encode>(symbol(c"munge_encode")?),
                decode: transmute::<*mut c_void, Decode>(symbol(c"munge_decode")?),
                strerror: transmute::<*mut c_void, StrError>(symbol(c"munge_strerror")?),
                create: transmute::<*mut c_void, Create>(symbol(c"munge_ctx_create")?),
                destroy: transmute::<*mut c_void, Destroy>(symbol(c"munge_ctx_destroy")?),
                set: transmute::<*mut c_void, Set>(symbol(c"munge_ctx_set")?),
                context_error: transmute::<*mut c_void, ContextError>(symbol(
                    c"munge_ctx_strerror",
                )?),
                socket,
            })
        }
    }

    /// A credential that says who runs this process and holds `payload`.
    ///
    /// # Errors
    /// [`MungeError::Call`], for example when munged does not run.
    pub fn encode(&self, payload: &[u8]) -> Result<String, MungeError> {
        let length =
            c_int::try_from(payload.len()).map_err(|_| MungeError::Payload(payload.len()))?;
        let context = self.context()?;
        let mut credential: *mut c_char = ptr::null_mut();
        // SAFETY: `payload` has `length` readable bytes, the context is live, the result goes to our pointer.
        let code = unsafe {
            (self.encode)(
                &mut credential,
                context.raw,
                payload.as_ptr().cast(),
                length,
            )
        };
        let credential = Allocated(credential.cast());
        if code != 0 || credential.0.is_null() {
            return Err(self.failed(&context, code));
        }
        // SAFETY: on success it is a NUL-terminated string that we own until `credential` is dropped.
        let text = unsafe { CStr::from_ptr(credential.0.cast()) };
        Ok(text.to_string_lossy().into_owned())
    }

    /// Checks a credential. munged refuses one that was shown before, is too old, or was made with another key.
    ///
    /// # Errors
    /// [`MungeError`]; the payload of a refused credential is never given.
    pub fn decode(&self, credential: &str) -> Result<Credential, MungeError> {
        let credential = CString::new(credential).map_err(|_| MungeError::Malformed)?;
        let context = self.context()?;
        let mut payload: *mut c_void = ptr::null_mut();
        let mut length: c_int = 0;
        let (mut uid, mut gid) = (libc::uid_t::MAX, libc::gid_t::MAX);
        // SAFETY: a NUL-terminated credential, a live context, and pointers to our own variables.
        let code = unsafe {
            (self.decode)(
                credential.as_ptr(),
                context.raw,
                &mut payload,
                &mut length,
                &mut uid,
                &mut gid,
            )
        };
        // It may be allocated for a refused credential too (expired, replayed).
        let payload = Allocated(payload);
        if code != 0 {
            return Err(self.failed(&context, code));
        }
        let length = usize::try_from(length).map_err(|_| MungeError::Malformed)?;
        if length > MAX_PAYLOAD {
            return Err(MungeError::Payload(length));
        }
        let bytes = if payload.0.is_null() || length == 0 {
            Vec::new()
        } else {
            // SAFETY: on success the buffer has `length` bytes and is ours until `payload` is dropped.
            unsafe { std::slice::from_raw_parts(payload.0.cast::<u8>(), length) }.to_vec()
        };
        Ok(Credential {
            payload: bytes,
            uid,
            gid,
        })
    }

    fn context(&self) -> Result<ContextGuard<'_>, MungeError> {
        // SAFETY: no arguments; null means out of memory.
        let raw = unsafe { (self.create)() };
        if raw.is_null() {
            return Err(MungeError::Call("out of memory".into()));
        }
        let context = ContextGuard { munge: self, raw };
        if let Some(socket) = &self.socket {
            // SAFETY: MUNGE_OPT_SOCKET takes a `const char *`, which the library copies.
            let code = unsafe { (self.set)(context.raw, OPT_SOCKET, socket.as_ptr()) };
            if code != 0 {
                return Err(self.failed(&context, code));
            }
        }
        Ok(context)
    }

    fn failed(&self, context: &ContextGuard<'_>, code: c_int) -> MungeError {
        // SAFETY: both return a NUL-terminated string (the first null when it has nothing to say) that lives as long
        // as the context or for ever, and is copied at once.
        let text = unsafe {
            let mut text = (self.context_error)(context.raw);
            if text.is_null() {
                text = (self.strerror)(code);
            }
            if text.is_null() {
                return MungeError::Call(format!("error {code}"));
            }
            CStr::from_ptr(text).to_string_lossy().into_owned()
        };
        MungeError::Call(text)
    }
}

/// A context of one call.
struct ContextGuard<'a> {
    munge: &'a Munge,
    raw: Context,
}

impl Drop for ContextGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: made by munge_ctx_create and destroyed once.
        unsafe { (self.munge.destroy)(self.raw) };
    }
}

/// Memory that the library allocated with malloc for us.
struct Allocated(*mut c_void);

impl Drop for Allocated {
    fn drop(&mut self) {
        // SAFETY: null or from malloc, and freed once.
        unsafe { libc::free(self.0) };
    }
}

fn loader_error() -> String {
    // SAFETY: dlerror returns null or a string that stays until the next call of the loader in this thread.
    unsafe {
        let text = libc::dlerror();
        if text.is_null() {
            return "unknown reason".into();
        }
        CStr::from_ptr(text).to_string_lossy().into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_covers_method_path_and_body() {
        let one = request_payload("POST", "/v1/pulls", b"{}");
        assert_eq!(one.len(), 64);
        // printf 'POST\n/v1/pulls\n%s\n' "$(printf '{}' | sha256sum | cut -c1-64)" | sha256sum
        assert_eq!(
            one,
            "90ac6e8375c186c79a75c1f561fa61d000cf67ef487257141d2119292323d8f8"
        );
        for other in [
            request_payload("GET", "/v1/pulls", b"{}"),
            request_payload("POST", "/v1/pulls?a", b"{}"),
            request_payload("POST", "/v1/pulls", b"{ }"),
        ] {
            assert_ne!(one, other);
        }
    }
}
