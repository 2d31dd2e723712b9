#[hopline::service]
trait Demo {
    async fn put(&self, #[cfg(unix)] value: u8);
}

fn main() {}
