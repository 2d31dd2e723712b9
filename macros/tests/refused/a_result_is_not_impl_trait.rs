#[hopline::service]
trait Demo {
    async fn put(&self) -> impl Iterator<Item = u8>;
    async fn set(&self) -> Result<impl Sized, ()>;
}

fn main() {}
