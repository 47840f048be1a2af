"""What a token is: the rule by which it is chosen, on every device alike. No device, no torch.

**The rule.** The token of a row is a pure function of its logits, its parameters, the tokens
before it, and (seed, choice, position). Other rows, their order, and threads have no influence.
Numba and torch implementations agree, except where two scores differ by an ulp of a logarithm.

**Order of application**, as in vLLM; each stage sees what the one before it left:

1. logit_bias is added; banned ids, ids outside allowed ids, and, until min_tokens were
   generated, stop ids become -inf.
2. Penalties: repetition (divides positive, multiplies other logits) over prompt and generated
   tokens; frequency (times the count) and presence over generated tokens.
3. Temperature 0: the largest logit, of equal ones the lowest id. Done.
4. min_p keeps logits of at least `largest + temperature * log(min_p)`, rounded to float32.
5. top_k keeps exactly the k first by (larger logit, lower id).
6. top_p keeps the shortest such prefix whose mass reaches `top_p` times the mass that steps 4
   and 5 left; masses are the integers of `sampling.softmax_mass`.
7. Gumbel-max over the kept ones, with the noise of `noise`; equal scores: the lowest id.

Each device has its own arithmetic for this (`devices.device.Sampling`).
"""
