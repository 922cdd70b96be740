<?php

declare(strict_types=1);

namespace Durable\Worker;

/** A whole number that PHP's integers cannot hold, as it stood in the JSON. As text it suits bcmath and gmp. */
final class BigInteger implements \JsonSerializable, \Stringable
{
    public function __construct(public readonly string $digits)
    {
        if (preg_match('/^-?(0|[1-9]\d*)$/D', $digits) !== 1) {
            throw new \ValueError('A BigInteger is made of digits.');
        }
    }

    public function __toString(): string
    {
        return $this->digits;
    }

    public function jsonSerialize(): string
    {
        return Json::mark() . $this->digits;
    }
}
