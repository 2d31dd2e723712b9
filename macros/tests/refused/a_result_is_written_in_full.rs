#[hopline::service]
trait Demo {
    async fn put(&self) -> Result<u8>;
    async fn set(&self) -> io::Result<()>;
    async fn show(&self) -> fmt::Result;
}

fn main() {}
