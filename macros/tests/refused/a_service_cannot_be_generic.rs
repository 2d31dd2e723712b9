#[hopline::service]
trait Demo<'a, T, const N: usize> {
    async fn put(&self, value: u8);
}

fn main() {}
